// Draws charts as SVG and maps of cells on a canvas. Texts are set as text alone, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const STOPS = VIRIDIS.map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function shown(value) {
  if (value === null || value === undefined) return "none";
  if (value === 0) return "0";  // also -0
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
}

function percent(share) {
  return share === null ? "none" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

// The colour of a share from 0 to 1 of a scale.
function colour(share) {
  const place = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(place));
  const part = place - low;
  return `rgb(${STOPS[low].map((value, at) => Math.round(value + part * (STOPS[low + 1][at] - value))).join()})`;
}

// A scale of colours over numbers: logarithmic where they are positive and span more than a factor of 30.
function scaleOf(values) {
  let low = Infinity, high = -Infinity, least = Infinity;
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
    if (value > 0) least = Math.min(least, value);
  }
  if (low > high) return { low: 0, high: 1, of: () => 0, at: (share) => share, isLog: false };
  if (low >= 0 && high > 30 * Math.max(low, 1e-9) && high / least > 30) {
    const start = Math.max(least, high / 1e4);
    const span = Math.log(high / start);
    const of = (value) => (value <= start ? 0 : Math.log(value / start) / span);
    return { low: start, high, of, at: (share) => start * Math.exp(share * span), isLog: true };
  }
  const span = high - low || 1;
  return { low, high, of: (value) => (value - low) / span, at: (share) => low + share * span, isLog: false };
}

function colourBar(scale, label, format = shown) {
  const id = `g${colourBar.count++}`;
  const stops = STOPS.map((_, at) => shape("stop", { offset: at / (STOPS.length - 1), "stop-color": colour(at / (STOPS.length - 1)) }));
  const node = shape("svg", { width: 240, height: 40, role: "img", "aria-label": `scale of ${label}` },
    shape("defs", {}, shape("linearGradient", { id }, ...stops)),
    shape("rect", { x: 1, y: 1, width: 180, height: 10, rx: 2, fill: `url(#${id})` }));
  for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    node.append(shape("text", { x: 1 + 180 * share, y: 24, "text-anchor": anchor }, format(scale.at(share))));
  }
  node.append(shape("text", { x: 1, y: 37 }, label + (scale.isLog ? " (logarithmic)" : "")));
  return node;
}
colourBar.count = 0;

// One box for all explanations under the pointer.
const tip = element("div", { id: "tip", role: "status", hidden: true });

function showTip(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 10 : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Draws into a box again whenever its width changes, and when the colours of the page do.
const redraws = new Set();

function responsive(draw, className = "") {
  const box = element("div", { class: className });
  let width = 0;
  const again = () => {
    if (width > 0) box.replaceChildren(...[draw(width)].flat());
  };
  // In a later frame: a browser reports an error for a change of sizes while it tells them.
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (Math.abs(box.clientWidth - width) < 1) return;
    width = box.clientWidth;
    again();
  })).observe(box);
  const redraw = () => (box.isConnected ? again() : redraws.delete(redraw));
  redraws.add(redraw);
  box.redraw = again;
  return box;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A map of cells. `rows` and `columns` are labels, the first row at the bottom, or with `fromTop` at the top.
// `values[row][column]` is a number, null (absent) or undefined (no cell). `pick(row, column)` is called for a click.
function cellMap({ rows, columns, values, scale, label, explain, pick, picked, xLabel, yLabel, fromTop, square, most = 26 }) {
  return responsive((width) => {
    const left = 44, bottom = 34, top = 4;
    const cell = Math.min(most, (width - left - 4) / columns.length);
    const tall = square ? cell : Math.min(most, 30, Math.max(3, Math.min(cell * 1.6, 460 / rows.length)));
    const height = top + tall * rows.length + bottom;
    const ratio = window.devicePixelRatio || 1;
    const canvas = element("canvas", { role: "img", "aria-label": label, tabindex: pick ? 0 : null, class: pick ? "picks" : "" });
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const draw = canvas.getContext("2d");
    draw.scale(ratio, ratio);
    const yOf = (row) => top + tall * (fromTop ? row : rows.length - 1 - row);
    const absent = css("--absent");
    const gap = cell > 8 && tall > 8 ? 1 : 0;
    for (let row = 0; row < rows.length; row++) {
      for (let column = 0; column < columns.length; column++) {
        const value = values[row][column];
        if (value === undefined) continue;
        draw.fillStyle = value === null ? absent : colour(scale.of(value));
        // Cells without a gap overlap a little: no line of the page shows between them.
        draw.fillRect(left + column * cell, yOf(row), cell - gap + (gap ? 0 : 0.4), tall - gap + (gap ? 0 : 0.4));
      }
    }
    const at = picked && picked();
    if (at) {
      draw.strokeStyle = css("--pick");
      draw.lineWidth = 2;
      draw.strokeRect(left + at[1] * cell, yOf(at[0]), Math.max(4, cell - gap), Math.max(4, tall - gap));
    }
    draw.fillStyle = css("--quiet");
    draw.font = "11px system-ui, sans-serif";
    draw.textAlign = "right";
    draw.textBaseline = "middle";
    let step = Math.ceil(14 / tall);
    for (let row = 0; row < rows.length; row += step) draw.fillText(rows[row], left - 5, yOf(row) + tall / 2);
    draw.textAlign = "center";
    step = Math.ceil(26 / cell);
    const base = top + tall * rows.length;
    for (let column = 0; column < columns.length; column += step) {
      draw.fillText(columns[column], left + (column + 0.5) * cell, base + 9);
    }
    draw.textAlign = "left";
    draw.fillText(xLabel, left, base + 25);
    draw.save();
    draw.translate(8, base);
    draw.rotate(-Math.PI / 2);
    draw.fillText(yLabel, 0, 0);
    draw.restore();
    const cellAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - left) / cell);
      const place = Math.floor((event.clientY - box.top - top) / tall);
      const row = fromTop ? place : rows.length - 1 - place;
      return values[row] !== undefined && values[row][column] !== undefined ? [row, column] : null;
    };
    canvas.addEventListener("pointermove", (event) => {
      const found = cellAt(event);
      if (found) showTip(explain(...found), event);
      else hideTip();
    });
    canvas.addEventListener("pointerleave", hideTip);
    if (pick) {
      canvas.addEventListener("click", (event) => {
        const found = cellAt(event);
        if (found) pick(...found);
      });
      const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [fromTop ? -1 : 1, 0], ArrowDown: [fromTop ? 1 : -1, 0] };
      canvas.addEventListener("keydown", (event) => {
        const change = steps[event.key];
        if (!change) return;
        event.preventDefault();
        const [row, column] = picked() || [0, -1];
        const next = [row + change[0], column + change[1]];
        if (values[next[0]] !== undefined && values[next[0]][next[1]] !== undefined) pick(...next, true);
      });
    }
    return canvas;
  });
}

// Round numbers in a range, at most about `most`.
function ticksOf(low, high, most = 5) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / most));
  const step = power * [1, 2, 5, 10].find((factor) => span / (power * factor) <= most);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) ticks.push(Number(tick.toPrecision(10)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); power <= Math.log10(high) + 1e-9; power++) ticks.push(10 ** power);
  const step = Math.ceil(ticks.length / 6);
  return ticks.length > 1 ? ticks.filter((_, at) => at % step === 0) : [low, high];
}

function powerText(value) {
  return shown(Number(value.toPrecision(2)));
}

// Axes of a chart: `x` and `y` have low, high, label, and optionally ticks ([value, text]) and isLog.
function axes(width, height, x, y) {
  const left = 62, right = 12, top = 8, bottom = 38;
  const position = (axis, start, end) => {
    const [low, high] = axis.isLog ? [Math.log(axis.low), Math.log(axis.high)] : [axis.low, axis.high];
    return (value) => start + (((axis.isLog ? Math.log(value) : value) - low) / (high - low || 1)) * (end - start);
  };
  const xOf = position(x, left, width - right);
  const yOf = position(y, height - bottom, top);
  const node = shape("svg", { width, height, role: "img" });
  const ticks = (axis, most) => axis.ticks || (axis.isLog ? logTicks(axis.low, axis.high).map((value) => [value, powerText(value)])
    : ticksOf(axis.low, axis.high, most).map((value) => [value, shown(value)]));
  for (const [value, text] of ticks(y, 5)) {
    node.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: yOf(value), y2: yOf(value) }),
      shape("text", { x: left - 6, y: yOf(value) + 4, "text-anchor": "end" }, text));
  }
  let last = -Infinity;
  for (const [value, text] of ticks(x, Math.max(2, width / 70))) {
    const place = xOf(value);
    if (place - last < 12 + 6 * text.length) continue;
    last = place;
    node.append(shape("text", { x: place, y: height - bottom + 15, "text-anchor": "middle" }, text));
  }
  node.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    shape("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, x.label),
    shape("text", { x: 9, y: (top + height - bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 9 ${(top + height - bottom) / 2})` }, y.label));
  return { node, xOf, yOf, left, right: width - right, top, bottom: height - bottom };
}

function pathOf(points) {
  let path = "", pen = false;
  for (const point of points) {
    path += point === null ? "" : `${pen ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
    pen = point !== null;
  }
  return path;
}

function extent(values, fromZero = false) {
  const known = values.filter((value) => value !== null && Number.isFinite(value));
  let low = Infinity, high = -Infinity;
  for (const value of known) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return [0, 1];
  if (fromZero) low = Math.min(0, low);
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [fromZero && low === 0 ? 0 : low - margin, high + margin];
}

// Lines over shared x values. A series has name, className, y, and optionally sd (a band) and dots ([x, y]).
function lineChart({ x, series, xLabel, yLabel, xTicks, xText = shown, height = 230, logY, label }) {
  return responsive((width) => {
    const all = series.flatMap((one) => one.y.flatMap((value, at) => (value === null ? [] :
      one.sd ? [value - (one.sd[at] || 0), value + (one.sd[at] || 0)] : [value])));
    const positive = all.filter((value) => value > 0);
    const [low, high] = logY ? [Math.min(...positive), Math.max(...positive)] : extent(all);
    const [first, end] = [Math.min(...x), Math.max(...x)];
    const at = axes(width, height, { low: first, high: end === first ? first + 1 : end, label: xLabel, ticks: xTicks },
      { low, high, label: yLabel, isLog: logY });
    at.node.setAttribute("aria-label", label);
    for (const one of series) {
      const group = shape("g", { class: one.className });
      if (one.sd) {
        const known = x.map((_, index) => index).filter((index) => one.y[index] !== null && one.sd[index] !== null);
        const edge = (sign) => known.map((index) => [at.xOf(x[index]), at.yOf(one.y[index] + sign * one.sd[index])]);
        if (known.length > 1) group.append(shape("path", { class: "band", d: `${pathOf([...edge(1), ...edge(-1).reverse()])}Z` }));
      }
      for (const [dotX, dotY] of one.dots || []) {
        if (dotY !== null && dotY >= low && dotY <= high) group.append(shape("circle", { class: "fill pale", cx: at.xOf(dotX), cy: at.yOf(dotY), r: 1.8 }));
      }
      const points = x.map((value, index) => (one.y[index] === null || (logY && one.y[index] <= 0) ? null : [at.xOf(value), at.yOf(one.y[index])]));
      group.append(shape("path", { class: `line ${one.dashed ? "dashed" : ""}`, d: pathOf(points) }));
      if (x.length <= 60) points.forEach((point) => point && group.append(shape("circle", { class: "fill", cx: point[0], cy: point[1], r: 2.2 })));
      at.node.append(group);
    }
    hover(at.node, (event, box) => {
      const place = (event.clientX - box.left) * (width / box.width);
      let near = 0;
      x.forEach((value, index) => { if (Math.abs(at.xOf(value) - place) < Math.abs(at.xOf(x[near]) - place)) near = index; });
      const lines = series.filter((one) => one.y[near] !== null && one.y[near] !== undefined)
        .map((one) => `${one.name}: ${shown(one.y[near])}${one.sd && one.sd[near] !== null ? ` ± ${shown(one.sd[near])}` : ""}`);
      return [xText(x[near], near), ...lines].join("\n");
    });
    return at.node;
  });
}

function hover(node, textOf) {
  node.addEventListener("pointermove", (event) => {
    const text = textOf(event, node.getBoundingClientRect());
    if (text) showTip(text, event);
    else hideTip();
  });
  node.addEventListener("pointerleave", hideTip);
}

function legend(entries) {
  return element("div", { class: "legend" }, ...entries.map(([name, className]) =>
    element("span", { class: className }, element("i"), name)));
}

function tableOf(header, rows) {
  return element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...header.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell)))))));
}

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

// Shares that were packed as 255 times their square root.
function sharesOf(text) {
  return Array.from(bytesOf(text), (byte) => (byte / 255) ** 2);
}
