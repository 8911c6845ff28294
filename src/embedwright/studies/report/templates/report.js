
(function () {
  "use strict";
  const { charts, map } = JSON.parse(document.getElementById("drawn").textContent);
  const tip = document.getElementById("tip");
  const colour = (i) => `var(--c${i % 10})`;

  function make(parent, tag, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  function written(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0+e\+?/, "e");
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(parseFloat(value.toPrecision(4)));
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  function showTip(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4)) + "px";
  }

  function range(values, whole) {
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
    if (whole) return [low, high];
    if (low > 0 && low < 0.4 * high) low = 0;
    return [low, high + (high - low) * 0.05];
  }

  // A line for each series over one x axis, with the stages of a run marked. What is not finite is a gap.
  function draw(holder, spec) {
    holder.textContent = "";
    const width = Math.max(holder.clientWidth, 200), height = 210, left = 56, right = 12, bottom = 36;
    const top = spec.marks.length ? 22 : 8;
    const [x0, x1] = range(spec.series.flatMap((s) => s.x), true);
    const [y0, y1] = range(spec.series.flatMap((s) => s.y).filter((y) => y !== null));
    const X = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
    const Y = (y) => height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
    const svg = make(holder, "svg", { viewBox: `0 0 ${width} ${height}`, height: height, "aria-hidden": "true" });
    for (const y of ticks(y0, y1, 4)) {
      make(svg, "line", { class: "grid", x1: left, x2: width - right, y1: Y(y), y2: Y(y) });
      make(svg, "text", { x: left - 8, y: Y(y) + 4, "text-anchor": "end" }, written(y) + (spec.unit || ""));
    }
    for (const x of ticks(x0, x1, width < 380 ? 4 : 7)) {
      if (spec.x === "step" && x % 1) continue;
      make(svg, "text", { x: X(x), y: height - bottom + 16, "text-anchor": "middle" }, written(x));
    }
    make(svg, "text", { x: width - right, y: height - 4, "text-anchor": "end" }, spec.x);
    spec.marks.forEach((mark, i) => {
      const from = X(Math.max(mark.from, x0)), room = X(Math.min(mark.to, x1)) - from;
      if (i) make(svg, "line", { class: "stage", x1: from, x2: from, y1: 4, y2: height - bottom });
      const name = mark.name.slice(0, Math.floor(room / 7));
      make(svg, "text", { x: from + (i ? 6 : 0), y: 13 }, name.length < mark.name.length ? name.slice(0, -1) + "…" : name);
    });
    spec.series.forEach((series, i) => {
      let path = "", pen = false;
      series.x.forEach((x, k) => {
        const y = series.y[k];
        if (y !== null) path += `${pen ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`;
        if (y !== null && (series.dots || (!pen && (series.y[k + 1] ?? null) === null))) {
          make(svg, "circle", { cx: X(x), cy: Y(y), r: 3, style: `fill:${colour(i)}` });
        }
        pen = y !== null;
      });
      if (series.area) {
        const ends = [series.x.at(-1), series.x[0]].map((x) => `L${X(x)} ${Y(Math.max(y0, 0))}`);
        make(svg, "path", { class: "area", d: path + ends.join(""), style: `fill:${colour(i)}` });
      }
      make(svg, "path", { class: "line" + (series.dashed ? " dashed" : ""), d: path, style: `stroke:${colour(i)}` });
    });
    const cursor = make(svg, "line", { class: "stage", y1: top, y2: height - bottom, visibility: "hidden" });
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) * width / box.width;
      const xs = [...new Set(spec.series.flatMap((s) => s.x))];
      const x = xs.reduce((best, x) => Math.abs(X(x) - at) < Math.abs(X(best) - at) ? x : best);
      const lines = spec.series.filter((s) => s.x.includes(x)).map((s) => {
        const y = s.y[s.x.indexOf(x)];
        return `${s.name}: ${y === null ? "not finite" : written(y) + (spec.unit || "")}`;
      });
      cursor.setAttribute("x1", X(x));
      cursor.setAttribute("x2", X(x));
      cursor.setAttribute("visibility", "visible");
      showTip(event, [`${spec.x} ${written(x)}`, ...lines].join("\n"));
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
    if (spec.series.length > 1) legend(holder, spec.series.map((s) => s.name));
  }

  function legend(holder, names) {
    const list = document.createElement("ul");
    list.className = "legend";
    list.setAttribute("aria-hidden", "true");
    names.forEach((name, i) => {
      const item = document.createElement("li"), key = document.createElement("span");
      key.className = "key";
      key.style.background = colour(i);
      item.append(key, name);
      list.appendChild(item);
    });
    holder.appendChild(list);
  }

  function drawAll() {
    for (const holder of document.querySelectorAll("[data-chart]")) draw(holder, charts[holder.dataset.chart]);
  }

  // Points on a canvas, which can be zoomed, moved and asked. A label that is chosen stands out from the others.
  // Ten colours and four shapes tell labels apart; then they come again.
  function drawMap(canvas, spec) {
    const view = { zoom: 1, x: 0, y: 0 }, fingers = new Map();
    let chosen = -1, under = -1, moved = false;
    const size = () => Math.min(canvas.clientWidth, canvas.clientHeight) - 40;
    const place = ([x, y]) => [
      (canvas.clientWidth / 2) + (x - 0.5) * size() * view.zoom + view.x,
      (canvas.clientHeight / 2) + (y - 0.5) * size() * view.zoom + view.y,
    ];

    function paint() {
      const ratio = devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
      const shades = [...Array(10).keys()].map((i) => style.getPropertyValue(`--c${i}`));
      const other = style.getPropertyValue("--other"), brush = canvas.getContext("2d");
      canvas.width = canvas.clientWidth * ratio;
      canvas.height = canvas.clientHeight * ratio;
      brush.scale(ratio, ratio);
      const radius = Math.min(3 + Math.log2(view.zoom), 6) + (spec.points.length < 400 ? 1 : 0);
      const dot = (point, more) => {
        const [x, y] = place(point), r = radius + more, shape = Math.floor(point[2] / 10) % 4;
        brush.beginPath();
        if (shape === 0) { brush.arc(x, y, r, 0, 7); return; }
        const corners = [[], [[-1, -1], [1, -1], [1, 1], [-1, 1]], [[0, -1.3], [1.2, 1], [-1.2, 1]], [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]]];
        for (const [dx, dy] of corners[shape]) brush.lineTo(x + dx * r, y + dy * r);
        brush.closePath();
      };
      const order = [...spec.points.keys()].sort((a, b) => (spec.points[a][2] === chosen) - (spec.points[b][2] === chosen));
      for (const i of order) {
        const label = spec.points[i][2], alone = label === chosen;
        brush.globalAlpha = chosen < 0 ? 0.8 : alone ? 1 : 0.25;
        brush.fillStyle = chosen < 0 || alone ? shades[label % 10] : other;
        dot(spec.points[i], 0);
        brush.fill();
      }
      brush.globalAlpha = 1;
      if (under >= 0) {
        brush.strokeStyle = style.getPropertyValue("--text");
        brush.lineWidth = 2;
        dot(spec.points[under], 2);
        brush.stroke();
      }
      Object.assign(canvas.dataset, { zoom: view.zoom.toFixed(3), x: view.x.toFixed(1), y: view.y.toFixed(1) });
    }

    function zoom(factor, x, y) {
      const after = Math.min(Math.max(view.zoom * factor, 1), 64), grown = after / view.zoom;
      const [fromX, fromY] = [x - canvas.clientWidth / 2, y - canvas.clientHeight / 2];
      view.x = fromX - (fromX - view.x) * grown;
      view.y = fromY - (fromY - view.y) * grown;
      view.zoom = after;
      if (after === 1) view.x = view.y = 0;
      paint();
    }
    const middle = (factor) => zoom(factor, canvas.clientWidth / 2, canvas.clientHeight / 2);
    const move = (x, y) => { view.x += x; view.y += y; paint(); };
    const reset = () => { Object.assign(view, { zoom: 1, x: 0, y: 0 }); paint(); };
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left - canvas.clientLeft, event.clientY - box.top - canvas.clientTop];
    };

    function ask(event) {
      const [x, y] = at(event);
      let best = 14, found = -1;
      spec.points.forEach((point, i) => {
        const [px, py] = place(point), far = Math.hypot(px - x, py - y);
        if (far < best && (chosen < 0 || point[2] === chosen)) { best = far; found = i; }
      });
      if (found !== under) { under = found; paint(); }
      if (found < 0) tip.hidden = true;
      else showTip(event, `${spec.labels[spec.points[found][2]].name}\n${spec.texts[found]}`);
    }

    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 400), ...at(event));
      ask(event);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, at(event));
      canvas.setPointerCapture(event.pointerId);
      moved = false;
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId), now = at(event);
      if (!before) { ask(event); return; }
      const still = [...fingers].find(([id]) => id !== event.pointerId);
      fingers.set(event.pointerId, now);
      moved = true;
      tip.hidden = true;
      if (!still) { move(now[0] - before[0], now[1] - before[1]); return; }
      const far = (point) => Math.hypot(point[0] - still[1][0], point[1] - still[1][1]) || 1;
      zoom(far(now) / far(before), (now[0] + still[1][0]) / 2, (now[1] + still[1][1]) / 2);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => {
        fingers.delete(event.pointerId);
        if (end === "pointerup" && !moved) ask(event);
      });
    }
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") { tip.hidden = true; under = -1; paint(); }
    });
    canvas.addEventListener("keydown", (event) => {
      const act = {
        "+": () => middle(1.4), "=": () => middle(1.4), "-": () => middle(1 / 1.4), 0: reset,
        ArrowLeft: () => move(40, 0), ArrowRight: () => move(-40, 0), ArrowUp: () => move(0, 40), ArrowDown: () => move(0, -40),
      }[event.key];
      if (act && !event.ctrlKey && !event.metaKey) { event.preventDefault(); act(); }
    });
    for (const button of document.querySelectorAll("[data-do]")) {
      button.addEventListener("click", { in: () => middle(1.6), out: () => middle(1 / 1.6), reset: reset }[button.dataset.do]);
    }
    const labels = [...document.querySelectorAll("[data-label]")];
    labels.forEach((button, number) => button.addEventListener("click", () => {
      chosen = chosen === number ? -1 : number;
      labels.forEach((each, i) => each.setAttribute("aria-pressed", String(i === chosen)));
      paint();
    }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    paint();
    return paint;
  }

  const canvas = document.getElementById("canvas");
  const paint = canvas ? drawMap(canvas, map) : () => {};
  let drawnAt = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawAll(); }
    paint();
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  drawAll();
})();
