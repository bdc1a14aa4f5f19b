// What is on the screen as PNG; tiles or regions of the slide as GeoJSON.

import { el } from "./el.js";
import { state } from "./state.js";

export function download(name, address) {
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

/** The panes side by side as they are seen, with scale bar and colours. */
export function picture(panes, name) {
  const dense = devicePixelRatio || 1;
  const width = panes.reduce((sum, pane) => sum + pane.stage.clientWidth, 0);
  const height = Math.max(...panes.map((pane) => pane.stage.clientHeight));
  const sheet = el("canvas", { width: Math.round(width * dense), height: Math.round(height * dense) });
  const context = sheet.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, sheet.width, sheet.height);
  let left = 0;
  for (const pane of panes) {
    const box = [left * dense, 0, pane.stage.clientWidth * dense, pane.stage.clientHeight * dense];
    context.drawImage(pane.viewer.drawer.canvas, ...box);
    context.drawImage(pane.canvas, ...box);
    legend(context, pane, left * dense, dense);
    left += pane.stage.clientWidth;
  }
  return new Promise((resolve) => {
    sheet.toBlob((blob) => {
      const address = URL.createObjectURL(blob);
      download(`${name}.png`, address);
      setTimeout(() => URL.revokeObjectURL(address), 10000);
      resolve(blob);
    });
  });
}

function legend(context, pane, left, dense) {
  context.save();
  context.setTransform(dense, 0, 0, dense, left, 0);
  context.font = "12px sans-serif";
  context.fillStyle = "rgb(255 255 255 / 85%)";
  const bottom = pane.stage.clientHeight - 44;
  const bar = parseFloat(pane.scale.bar.style.width) || 0;
  context.fillRect(10, bottom, Math.max(bar, 110) + 12, 36);
  if (!pane.colourbar.hidden) context.fillRect(10, 10, 220, 44);
  context.fillStyle = "#1b2733";
  context.fillRect(16, bottom + 6, bar, 5);
  context.fillText(pane.scale.text.textContent, 16, bottom + 27);
  if (!pane.colourbar.hidden) {
    context.fillText(pane.barName.textContent, 16, 24, 208);
    context.drawImage(pane.bar, 16, 30, 200, 8);
    const [low, high] = [...pane.barEnds.children].map((end) => end.textContent);
    context.fillText(low, 16, 50);
    context.textAlign = "right";
    context.fillText(high, 216, 50);
  }
  context.restore();
}

export function geojson(slide, what) {
  const { study, kind, scale, member, target, threshold } = state;
  const query = new URLSearchParams({ kind, scale });
  if (member !== "all") query.set("member", member);
  if (kind === "evidence" && target !== "") query.set("target", target);
  if (what === "regions") query.set("threshold", threshold === "" ? (scale === "percentile" ? 90 : 0) : threshold);
  download(`${slide.name}_${what}.geojson`, `study/${study}/slide/${slide.number}/${what}.geojson?${query}`);
}
