// The slide's own levels as a tile source for OpenSeadragon, which counts levels from the coarsest.

/* global OpenSeadragon */

export function sourceOf(number, info) {
  const levels = [...info.levels].reverse();
  const size = info.tile_px ?? 1024;
  const source = new OpenSeadragon.TileSource({ width: info.width, height: info.height, tileSize: size, tileOverlap: 0, minLevel: 0, maxLevel: Math.max(0, levels.length - 1) });
  if (!levels.length) {
    source.tileExists = () => false;
    source.getTileUrl = () => "";
    return source;
  }
  source.getLevelScale = (level) => 1 / (levels[level]?.downsample ?? 1);
  source.getNumTiles = (level) => new OpenSeadragon.Point(Math.ceil(levels[level].width / size), Math.ceil(levels[level].height / size));
  source.getTileUrl = (level, x, y) => `slide/${number}/level/${levels.length - 1 - level}/${x}_${y}.jpg`;
  return source;
}
