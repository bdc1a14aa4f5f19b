// What is shown, as one flat object that the URL's fragment holds: a link shows the same again.

const DEFAULTS = {
  slide: "", sort: "error", text: "", label: "", group: "", role: "", site: "", mark: "",
  study: 0, kind: "attention", member: "all", target: "",
  study2: "", kind2: "attention", member2: "all", target2: "",
  heat: 1, opacity: 0.6, scale: "percentile", fixed: 0, low: "", high: "", threshold: "",
  outlines: 1, tissue: 0, grid: 0,
  x: "", y: "", zoom: "",
};
const listeners = [];
export const state = { ...DEFAULTS };

function fromUrl() {
  const given = new URLSearchParams(location.hash.slice(1));
  const read = { ...DEFAULTS };
  for (const [key, fallback] of Object.entries(DEFAULTS)) {
    if (!given.has(key)) continue;
    const text = given.get(key);
    const number = Number(text);
    if (typeof fallback === "number") read[key] = Number.isFinite(number) ? number : fallback;
    else read[key] = ["x", "y", "zoom", "low", "high", "threshold"].includes(key) && !Number.isFinite(number) ? "" : text;
  }
  return read;
}

let waiting = 0;
function toUrl() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const kept = Object.entries(state).filter(([key, value]) => String(value) !== String(DEFAULTS[key]));
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }, 120);
}

export function set(changes) {
  const changed = Object.keys(changes).filter((key) => String(state[key]) !== String(changes[key]));
  if (!changed.length) return;
  Object.assign(state, changes);
  toUrl();
  const names = new Set(changed);
  for (const [keys, listener] of listeners) if (keys.some((key) => names.has(key))) listener(names);
}

export function on(keys, listener) {
  listeners.push([keys, listener]);
}

export function start() {
  Object.assign(state, fromUrl());
  addEventListener("hashchange", () => set(fromUrl()));
}

export const here = () => (state.x === "" || state.y === "" || state.zoom === "" ? null : { x: +state.x, y: +state.y, zoom: +state.zoom });
