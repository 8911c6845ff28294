
(function () {
  "use strict";
  const charts = JSON.parse(document.getElementById("charts").textContent);
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
      make(svg, "text", { x: left - 8, y: Y(y) + 4, "text-anchor": "end" }, written(y));
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
      make(svg, "path", { class: "line" + (series.dashed ? " dashed" : ""), d: path, style: `stroke:${colour(i)}` });
    });
    const cursor = make(svg, "line", { class: "stage", y1: top, y2: height - bottom, visibility: "hidden" });
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) * width / box.width;
      const xs = [...new Set(spec.series.flatMap((s) => s.x))];
      const x = xs.reduce((best, x) => Math.abs(X(x) - at) < Math.abs(X(best) - at) ? x : best);
      const lines = spec.series.filter((s) => s.x.includes(x)).map((s) => {
        const y = s.y[s.x.indexOf(x)];
        return `${s.name}: ${y === null ? "not finite" : written(y)}`;
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
  let drawnAt = 0;
  addEventListener("resize", () => {
    if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawAll(); }
  });
  drawAll();
})();
