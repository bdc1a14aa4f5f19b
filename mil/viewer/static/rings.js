// Areas on the slide: polygons with holes in level-0 px, drawn as lines.

const COLOURS = { tissue: "#00a03c", exclude: "#c83c28" };
const OTHERS = ["#d55e00", "#0072b2", "#cc79a7", "#009e73", "#e69f00", "#56b4e9"];

export function pathOf(areas) {
  const paths = new Map();
  for (const { name, rings } of areas) {
    if (!paths.has(name)) paths.set(name, new Path2D());
    for (const ring of rings) {
      ring.forEach(([x, y], i) => (i ? paths.get(name).lineTo(x, y) : paths.get(name).moveTo(x, y)));
      paths.get(name).closePath();
    }
  }
  return paths;
}

/** At a zoom in screen pixels per level-0 px: `context` is in level-0 px already. */
export function drawRings(context, paths, zoom, filled = false) {
  let place = 0;
  for (const [name, path] of paths) {
    const colour = COLOURS[name.toLowerCase()] ?? OTHERS[place++ % OTHERS.length];
    if (filled) {
      context.globalAlpha = 0.25;
      context.fillStyle = colour;
      context.fill(path, "evenodd");
      context.globalAlpha = 1;
    }
    context.lineJoin = "round";
    context.strokeStyle = "rgb(255 255 255 / 80%)";
    context.lineWidth = 4 / zoom;
    context.stroke(path);
    context.strokeStyle = colour;
    context.lineWidth = 2 / zoom;
    context.stroke(path);
  }
}
