// The map: documents as points, coloured by a metadata column, with the hits of the last search marked.
import { $, h, count } from "./dom.js";
import { ask } from "./api.js";
import { problem } from "./hits.js";

const COLOURS = 9, SHADES = 5;

// The groups of a column's values, each with its name, size and colour, and the group of each value. A column of many
// different numbers has groups of equal size; one of many texts has its largest groups, and one for the others.
export function groupsOf(values) {
  const known = values.filter((value) => value !== null), distinct = new Set(known);
  let names, groupOf;
  if (distinct.size > COLOURS && known.every((value) => typeof value === "number")) {
    const sorted = [...known].sort((a, b) => a - b);
    const lows = [...new Set([...Array(SHADES).keys()].map((i) => sorted[Math.floor((i * sorted.length) / SHADES)]))];
    groupOf = (value) => lows.findLastIndex((low) => value >= low);
    const tops = lows.map((_, i) => sorted.findLast((value) => groupOf(value) === i));
    names = lows.map((low, i) => ({ name: low === tops[i] ? `${low}` : `${low} to ${tops[i]}`, colour: `--s${i}` }));
  } else {
    const sizes = new Map();
    for (const value of known) sizes.set(value, (sizes.get(value) ?? 0) + 1);
    const largest = [...sizes].sort((a, b) => b[1] - a[1]).map(([value]) => value);
    const own = largest.length > COLOURS + 1 ? COLOURS : largest.length;
    names = largest.slice(0, own).map((value, i) => ({ name: String(value), colour: `--c${i}` }));
    if (own < largest.length) names.push({ name: `${largest.length - own} others`, colour: "--other" });
    const places = new Map(largest.map((value, i) => [value, Math.min(i, own)]));
    groupOf = (value) => places.get(value);
  }
  const missing = names.length;
  if (known.length < values.length) names.push({ name: "no value", colour: "--other" });
  const of = values.map((value) => (value === null ? missing : groupOf(value)));
  for (const group of of) names[group].count = (names[group].count ?? 0) + 1;
  return { names, of };
}

export function makeMap(panel, coloured) {
  const view = { zoom: 1, x: 0, y: 0 }, fingers = new Map(), tip = $("tip");
  let sides = [], at = 0, data = null, groups = null, chosen = -1, under = -1, marked = [], moved = false, wanted = null;

  const side = h("select", { id: "map-side", onchange: () => { at = side.selectedIndex; load(); } });
  const colour = h("select", { id: "map-colour", onchange: () => { paintBy(colour.value); coloured(colour.value); } });
  const sideLabel = h("label", {}, h("span", {}, "Index of"), side), colourLabel = h("label", {}, h("span", {}, "Coloured by"), colour);
  const button = (name, label, act) => h("button", { type: "button", "aria-label": label, title: label, onclick: act }, name);
  const buttons = h("div", { class: "buttons" },
    button("+", "Zoom in", () => middle(1.6)), button("−", "Zoom out", () => middle(1 / 1.6)), button("Reset", "Reset", () => reset()));
  const canvas = h("canvas", { tabindex: "0", role: "img", id: "canvas" });
  const legend = h("ul", { class: "legend", "aria-label": "Groups of the map" }), about = h("p", { class: "note", role: "status" });
  const help = h("p", { class: "note" }, "Wheel, pinch, + and − zoom; drag or arrows move; 0 shows all; N goes to the next hit. A click opens a document; Enter points at the one in the middle, then opens it. Choose a group to see it alone.");
  const sheet = h("dialog", { class: "sheet", "aria-label": "Document" });
  const drawn = h("div", { class: "drawn", hidden: true }, h("div", { class: "canvas" }, canvas, buttons),
    h("div", { class: "beside" }, h("div", { class: "row" }, colourLabel, sideLabel), legend, help));
  panel.append(about, drawn, sheet);

  async function load() {
    const own = sides[at];
    drawn.hidden = true;
    about.textContent = "Laying out the documents… The first time may take half a minute.";
    try {
      own.map ??= await ask(`${own.base}map`);
    } catch (error) {
      about.replaceChildren(problem(error, load));
      return;
    }
    if (own !== sides[at]) return;
    data = own.map;
    [data.left, data.right, data.top, data.bottom] = [...range(data.x), ...range(data.y)];
    const size = data.ids.length, columns = Object.keys(data.metadata);
    const sample = `${size.toLocaleString("en")} of ${count(data.of, "document")}, drawn at random (seed ${data.seed})`;
    about.textContent = `${size < data.of ? sample : count(size, "document")}. Layout: ${data.method}.`;
    colour.replaceChildren(...columns.map((name) => h("option", {}, name)));
    colourLabel.hidden = !columns.length;
    const kinds = (name) => new Set(data.metadata[name]).size;
    const usual = columns.find((name) => kinds(name) > 1 && kinds(name) <= COLOURS + 1) ?? columns[0];
    colour.value = columns.includes(wanted) ? wanted : usual;
    drawn.hidden = false;
    paintBy(colour.value);
  }

  function paintBy(name) {
    groups = groupsOf(data.metadata[name] ?? data.ids.map(() => "document"));
    chosen = under = -1;
    legend.hidden = !name;
    legend.replaceChildren(...groups.names.map((group, i) => {
      const key = h("span", { class: "key" });
      key.style.background = `var(${group.colour})`;
      const size = h("small", {}, group.count.toLocaleString("en"));
      return h("li", {}, h("button", { type: "button", "aria-pressed": "false", onclick: () => choose(i) }, key, `${group.name} `, size));
    }));
    paint();
  }

  function choose(i) {
    chosen = chosen === i ? -1 : i;
    legend.querySelectorAll("button").forEach((each, j) => each.setAttribute("aria-pressed", String(j === chosen)));
    paint();
  }

  // [point, rank] of the hits that are on the map, the best first.
  const ranked = () => marked.map((id, i) => [data.ids.indexOf(id), i + 1]).filter(([point]) => point >= 0);
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const place = (i) => {
    const scale = view.zoom * Math.min((canvas.clientWidth - 48) / (data.right - data.left || 1), (canvas.clientHeight - 48) / (data.bottom - data.top || 1));
    return [
      canvas.clientWidth / 2 + (data.x[i] - (data.left + data.right) / 2) * scale + view.x,
      canvas.clientHeight / 2 + (data.y[i] - (data.top + data.bottom) / 2) * scale + view.y,
    ];
  };

  function paint() {
    if (!data || drawn.hidden || !canvas.clientWidth) return;
    const ratio = devicePixelRatio || 1, style = getComputedStyle(document.documentElement), brush = canvas.getContext("2d");
    const shade = (name) => style.getPropertyValue(name), hits = ranked();
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    brush.scale(ratio, ratio);
    const radius = Math.min(2.6 + Math.log2(view.zoom), 6) + (data.ids.length < 800 ? 1 : 0);
    const disc = (i, r) => { brush.beginPath(); brush.arc(...place(i), r, 0, 7); };
    const shades = groups.names.map((group) => shade(group.colour));
    const order = [...data.ids.keys()].sort((a, b) => (groups.of[a] === chosen) - (groups.of[b] === chosen));
    for (const i of order) {
      const alone = groups.of[i] === chosen;
      brush.globalAlpha = chosen < 0 ? 0.75 : alone ? 1 : 0.2;
      brush.fillStyle = chosen < 0 || alone ? shades[groups.of[i]] : shade("--other");
      disc(i, radius);
      brush.fill();
    }
    brush.globalAlpha = 1;
    Object.assign(brush, { font: "600 12px system-ui, sans-serif", textAlign: "center", textBaseline: "middle", lineWidth: 2 });
    for (const [i, rank] of hits.toReversed()) { // a badge with the rank, the best on top
      const [x, y] = place(i);
      brush.fillStyle = shade("--text");
      brush.strokeStyle = shade("--card");
      disc(i, 10);
      brush.fill();
      brush.stroke();
      brush.fillStyle = shade("--card");
      brush.fillText(rank, x, y + 1);
    }
    brush.strokeStyle = shade("--text");
    if (under >= 0) { disc(under, (hits.some(([i]) => i === under) ? 10 : radius) + 4); brush.stroke(); }
    const by = colour.value ? ` coloured by ${colour.value}` : "";
    canvas.setAttribute("aria-label", `Map of ${count(data.ids.length, "document")}${by}, ${count(hits.length, "hit")} of the last search marked`);
    Object.assign(canvas.dataset, { zoom: view.zoom.toFixed(3), x: view.x.toFixed(1), y: view.y.toFixed(1), marked: hits.length });
  }

  function zoom(factor, x, y) {
    const after = Math.min(Math.max(view.zoom * factor, 1), 64), grown = after / view.zoom;
    const [fromX, fromY] = [x - canvas.clientWidth / 2, y - canvas.clientHeight / 2];
    Object.assign(view, { zoom: after, x: fromX - (fromX - view.x) * grown, y: fromY - (fromY - view.y) * grown });
    if (after === 1) view.x = view.y = 0;
    hide();
  }
  const middle = (factor) => zoom(factor, canvas.clientWidth / 2, canvas.clientHeight / 2);
  const move = (x, y) => { view.x += x; view.y += y; hide(); };
  const reset = () => { Object.assign(view, { zoom: 1, x: 0, y: 0 }); hide(); };
  const hide = () => { tip.hidden = true; under = -1; paint(); };
  const where = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left - canvas.clientLeft, event.clientY - box.top - canvas.clientTop];
  };

  function tell(i) {
    const [x, y] = place(i), box = canvas.getBoundingClientRect(), rank = ranked().find(([point]) => point === i)?.[1];
    under = i;
    paint();
    const lines = [data.titles[i], colour.value && `${colour.value}: ${data.metadata[colour.value][i] ?? "no value"}`, rank && `hit ${rank}`];
    tip.textContent = lines.filter(Boolean).join("\n");
    tip.hidden = false;
    const own = tip.getBoundingClientRect(), right = box.left + x + 14;
    tip.style.left = `${Math.max(4, right + own.width > innerWidth ? right - own.width - 28 : right)}px`;
    tip.style.top = `${Math.max(4, Math.min(box.top + y + 14, innerHeight - own.height - 4))}px`;
  }

  function nearest(x, y, within) {
    let best = within, found = -1;
    for (const i of data.ids.keys()) {
      const [px, py] = place(i), far = Math.hypot(px - x, py - y);
      if (far < best && (chosen < 0 || groups.of[i] === chosen)) { best = far; found = i; }
    }
    return found;
  }

  function over(event) {
    const found = nearest(...where(event), 14);
    if (found < 0) { if (under >= 0) hide(); } else if (found !== under) tell(found);
  }

  // Points at a document, and brings it into view.
  function pointAt(i) {
    const [x, y] = place(i), margin = 30;
    if (x < margin || y < margin || x > canvas.clientWidth - margin || y > canvas.clientHeight - margin) move(canvas.clientWidth / 2 - x, canvas.clientHeight / 2 - y);
    tell(i);
  }

  function nextHit() {
    const hits = ranked(), [next] = hits[(hits.findIndex(([point]) => point === under) + 1) % hits.length] ?? [];
    if (next !== undefined) pointAt(next);
  }

  const enter = () => (under < 0 ? pointAt(nearest(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity)) : open(under));

  async function open(i) {
    const close = h("button", { type: "button", onclick: () => sheet.close() }, "Close"), own = sides[at];
    const show = (...parts) => sheet.replaceChildren(h("div", { class: "row" }, h("h2", { class: "grow" }, data.titles[i]), close), ...parts);
    show(h("p", { class: "note" }, "Opening…"));
    if (!sheet.open) sheet.showModal(); // which gives the focus back to the map when it closes
    try {
      const found = await ask(`${own.base}document?id=${encodeURIComponent(data.ids[i])}`);
      const values = Object.entries(found.metadata).filter(([, value]) => value !== null).map(([column, value]) => `${column}: ${value}`);
      show(h("p", { class: "note" }, [found.id, ...values].join(" · ")), h("div", { class: "text" }, found.text));
    } catch (error) {
      show(problem(error, () => open(i)));
    }
  }

  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY / 400), ...where(event)); over(event); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, where(event)); canvas.setPointerCapture(event.pointerId); moved = false; });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId), now = where(event);
    if (!before) { over(event); return; }
    const still = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    fingers.set(event.pointerId, now);
    moved = true;
    if (!still) { move(now[0] - before[0], now[1] - before[1]); return; }
    const far = ([x, y]) => Math.hypot(x - still[0], y - still[1]) || 1;
    zoom(far(now) / far(before), (now[0] + still[0]) / 2, (now[1] + still[1]) / 2);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      const before = under;
      fingers.delete(event.pointerId);
      if (end !== "pointerup" || moved) return;
      over(event);
      if (under >= 0 && (event.pointerType === "mouse" || under === before)) open(under); // a first tap points at it
    });
  }
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const act = {
      "+": () => middle(1.4), "=": () => middle(1.4), "-": () => middle(1 / 1.4), 0: reset, n: nextHit, Enter: enter, Escape: hide,
      ArrowLeft: () => move(40, 0), ArrowRight: () => move(-40, 0), ArrowUp: () => move(0, 40), ArrowDown: () => move(0, -40),
    }[event.key];
    if (act && !event.ctrlKey && !event.metaKey) { event.preventDefault(); act(); }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  new ResizeObserver(paint).observe(canvas);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  return {
    show(all, name) {
      wanted = name;
      if (sides === all && data) { paint(); return; }
      sides = all;
      side.replaceChildren(...all.map((each) => h("option", {}, each.info.model)));
      sideLabel.hidden = all.length < 2;
      load();
    },
    mark(shown) {
      marked = (shown[at] ?? shown[0]).hits?.map((hit) => hit.id) ?? [];
      paint();
    },
  };
}
