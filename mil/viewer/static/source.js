// The slide's own levels as a tile source for OpenSeadragon, which counts levels from the coarsest.
//
// OpenSeadragon takes one scale a level for both axes. A level's sides are whole px, so that width and height are seldom
// shrunk by the same number: every tile is laid by its level's own sides, else level 1 lies up to a px beside level 0.

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
  const tall = info.height / info.width;
  source.getLevelScale = (level) => 1 / (levels[level]?.downsample ?? 1);
  source.getNumTiles = (level) => new OpenSeadragon.Point(Math.ceil(levels[level].width / size), Math.ceil(levels[level].height / size));
  source.getTileAtPoint = (level, point) => {
    const { width, height } = levels[level];
    const last = source.getNumTiles(level).minus(new OpenSeadragon.Point(1, 1));
    return new OpenSeadragon.Point(Math.min(last.x, Math.floor((point.x * width) / size)), Math.min(last.y, Math.floor(((point.y / tall) * height) / size)));
  };
  source.getTileBounds = (level, column, row, inItself) => {
    const { width, height } = levels[level];
    const [x, y] = [column * size, row * size];
    const [wide, high] = [Math.min(size, width - x), Math.min(size, height - y)];
    if (inItself) return new OpenSeadragon.Rect(0, 0, wide, high);
    return new OpenSeadragon.Rect(x / width, (y / height) * tall, wide / width, (high / height) * tall);
  };
  source.getTileUrl = (level, x, y) => `slide/${number}/level/${levels.length - 1 - level}/${x}_${y}.jpg`;
  return source;
}

/** OpenSeadragon's own drawer stretches every tile by one px, so that no seam is seen between two of them: pixels lie up
 * to one px, half of one on average, beside their place. Here the stretched one is drawn first, and the tile over it. */
export const exactDrawer = () =>
  class extends OpenSeadragon.CanvasDrawer {
    minimumOverlapRequired() {
      return false;
    }

    _drawTile(tile, ...how) {
      const { size } = tile;
      tile.size = size.plus(new OpenSeadragon.Point(1, 1));
      super._drawTile(tile, ...how);
      tile.size = size;
      super._drawTile(tile, ...how);
    }
  };
