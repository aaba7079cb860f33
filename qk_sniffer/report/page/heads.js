// Shows the maps of layers and heads, and one head.

const HEADS = facts.heads.map(([name, kind, layer, head, keyHead, size, rows, attention]) =>
  ({ name, kind, layer, head, keyHead, size, rows, attention }));
const BY_NAME = new Map(HEADS.map((head) => [head.name, head]));
const KIND_WORDS = { q: "query", k: "key", v: "value", o: "output" };

// The heads of each kind are in the order of the values of its maps.
const OF_KIND = new Map();
for (const head of HEADS) OF_KIND.set(head.kind, [...(OF_KIND.get(head.kind) || []), head]);

const chosen = { kind: null, map: null, head: null };

function mapsOf(kind) {
  return facts.maps.filter((map) => map.kind === kind);
}

function textOf(map, value) {
  return map.share ? (value === null ? "none" : shown(Number(value.toPrecision(3)))) : shown(value);
}

function headMap(map) {
  const heads = OF_KIND.get(map.kind);
  const layers = [...new Set(heads.map((head) => head.layer))].sort((one, other) => one - other);
  const columns = [...new Set(heads.map((head) => head.head))].sort((one, other) => one - other);
  const values = layers.map(() => columns.map(() => undefined));
  const names = layers.map(() => []);
  heads.forEach((head, index) => {
    const row = layers.indexOf(head.layer), column = columns.indexOf(head.head);
    values[row][column] = map.values[index];
    names[row][column] = head;
  });
  const scale = scaleOf(map.values);
  mapOfHeads = cellMap({
    rows: layers, columns, values, scale, most: columns.length > 16 ? 26 : 44,
    label: `${map.label} of the ${KIND_WORDS[map.kind]} heads, by layer and head; arrow keys move`,
    xLabel: `${KIND_WORDS[map.kind]} head`, yLabel: "layer",
    explain: (row, column) => `${names[row][column].name}, layer ${layers[row]}, head ${columns[column]}\n` +
      `${map.label}: ${textOf(map, values[row][column])}`,
    pick: (row, column, isKey) => choose(names[row][column].name, isKey),
    picked: () => {
      const head = BY_NAME.get(chosen.head);
      return head && head.kind === map.kind ? [layers.indexOf(head.layer), columns.indexOf(head.head)] : null;
    },
  });
  return element("div", {}, element("p", { class: "quiet" }, map.meaning), mapOfHeads, colourBar(scale, map.label, (value) => textOf(map, value)));
}

let showMaps = () => {};
let mapOfHeads = null;
let showHead = () => {};

function choose(name, keepsFocus) {
  chosen.head = name;
  const head = BY_NAME.get(name);
  if (head.kind !== chosen.kind) {
    chosen.kind = head.kind;
    chosen.map = mapsOf(head.kind)[0];
    showMaps();
  } else mapOfHeads.redraw();
  showHead();
  history.replaceState(null, "", `#${name}`);
  if (keepsFocus) mapOfHeads.firstChild.focus();
}

function headsSection() {
  const kinds = [...OF_KIND.keys()].filter((kind) => mapsOf(kind).length);
  if (!kinds.length) return null;
  const controls = element("div", { class: "controls" });
  const maps = element("div", { id: "maps" });
  const one = element("div", { id: "head", "aria-live": "polite" });
  showMaps = () => {
    const select = element("select", { id: "score", change: () => {
      chosen.map = mapsOf(chosen.kind)[Number(select.value)];
      drawMap();
    } });
    const groups = new Map();
    mapsOf(chosen.kind).forEach((map, index) => {
      if (!groups.has(map.group)) groups.set(map.group, select.appendChild(element("optgroup", { label: map.group })));
      groups.get(map.group).append(element("option", { value: index, selected: map === chosen.map }, map.label));
    });
    controls.replaceChildren(
      ...kinds.map((kind) => element("button", { type: "button", "aria-pressed": String(kind === chosen.kind), click: () => {
        chosen.kind = kind;
        chosen.map = mapsOf(kind).find((map) => chosen.map && map.name === chosen.map.name) || mapsOf(kind)[0];
        showMaps();
      } }, `${KIND_WORDS[kind]} heads`)),
      element("label", {}, "Map ", select));
    drawMap();
  };
  const drawMap = () => maps.replaceChildren(headMap(chosen.map));
  showHead = () => one.replaceChildren(...headView(BY_NAME.get(chosen.head)));
  chosen.kind = kinds[0];
  const interesting = ["sink", "ap_drift", "position_share"];
  chosen.map = interesting.map((name) => mapsOf(chosen.kind).find((map) => map.name === name)).find(Boolean) || mapsOf(chosen.kind)[0];
  const asked = decodeURIComponent(location.hash.slice(1));
  const first = BY_NAME.has(asked) ? BY_NAME.get(asked) : startHead(chosen.map);
  chosen.head = first.name;
  if (first.kind !== chosen.kind) {
    chosen.kind = first.kind;
    chosen.map = mapsOf(first.kind)[0];
  }
  showMaps();
  showHead();
  return element("section", { id: "heads" }, element("h2", {}, "Heads"),
    element("p", { class: "quiet" }, "Point at a cell for its head and value. Click it to see the head below. A grey cell has no value."),
    ...headNotes(), controls, maps, one);
}

// What the numbers of the heads are of.
function headNotes() {
  const notes = [];
  if (facts.sampled_rows < facts.rows) {
    notes.push(`Norms, channels and directions are of ${shown(facts.sampled_rows)} of the ${shown(facts.rows)} rows, of whole examples from all parts.`);
  }
  if (facts.attention) {
    notes.push(`Attention scores are means over queries at positions from ${shown(facts.attention.first_position)} on: close keys are nearer than ` +
      `${shown(facts.attention.close)} tokens, distant ones at least ${shown(facts.attention.far)} away, and the first ${shown(facts.attention.sink_tokens)} tokens are the sink.`);
  }
  if (facts.plasticity) notes.push(`Plasticity: ${facts.plasticity.map(([name, value]) => `${name.toLowerCase()} ${value}`).join("; ")}.`);
  return notes.map((text) => element("p", { class: "quiet small" }, text));
}

// The head with the largest value of the first map.
function startHead(map) {
  let best = 0;
  map.values.forEach((value, index) => { if (value !== null && (map.values[best] === null || value > map.values[best])) best = index; });
  return OF_KIND.get(map.kind)[best];
}

function headView(head) {
  const detail = facts.details[head.name] || {};
  const keyName = head.kind === "q" || head.kind === "o" ? HEADS.find((one) => one.kind === "k" && one.layer === head.layer && one.head === head.keyHead) : null;
  const index = OF_KIND.get(head.kind).indexOf(head);
  const values = mapsOf(head.kind).map((map) => [map.label, textOf(map, map.values[index]), map.meaning]);
  const served = head.kind === "k" || head.kind === "v" ? HEADS.filter((one) => one.kind === "q" && one.layer === head.layer && one.keyHead === head.head) : [];
  const related = keyName ? [keyName] : served;
  const sampled = detail.rows === undefined || detail.rows === head.rows ? "" : `, ${shown(detail.rows)} of them shown`;
  const about = element("div", {},
    element("dl", {},
      ...[["attention", head.attention], ["vectors", `${shown(head.rows)} rows of ${head.size} numbers${sampled}`], ...values]
        .flatMap(([name, value, meaning = null]) => [element("dt", { title: meaning }, name), element("dd", {}, value)])),
    related.length ? element("p", {}, `${keyName ? "key head" : "query heads"}: `, ...related.map((other) =>
      element("button", { type: "button", class: "link", click: () => choose(other.name) }, other.name)).flatMap((node) => [node, " "])) : null);
  const parts = [about, ...directionViews(head, keyName), positionView(head, detail, keyName), attentionView(head, detail),
    distanceView(detail), channelView(head, detail)].filter(Boolean);
  return [element("h3", {}, `${head.name}: layer ${head.layer}, ${KIND_WORDS[head.kind]} head ${head.head}`),
    element("div", { class: "columns" }, ...parts)];
}

function directionViews(head, keyHead) {
  return [head, keyHead].filter(Boolean).map((one) => {
    const detail = facts.details[one.name];
    return detail && detail.points ? scatter(one, detail) : null;
  });
}

// The rows of a head in its two principal directions, coloured by position.
function scatter(head, detail) {
  const bytes = bytesOf(detail.points.xy);
  const steps = new DataView(bytes.buffer), positionBytes = new DataView(bytesOf(detail.points.positions).buffer);
  const points = Array.from({ length: bytes.length / 4 }, (_, at) => ({
    x: (steps.getInt16(4 * at, true) / 32767) * detail.points.scale,
    y: (steps.getInt16(4 * at + 2, true) / 32767) * detail.points.scale,
    position: positionBytes.getInt32(4 * at, true),
  }));
  const most = Math.log2(facts.longest + 1);
  const scale = { isLog: true, low: 0, high: facts.longest, at: (share) => Math.round(2 ** (share * most) - 1) };
  const node = responsive((width) => {
    const height = Math.min(300, Math.max(220, width * 0.75));
    const [xLow, xHigh] = extent(points.map((point) => point.x)), [yLow, yHigh] = extent(points.map((point) => point.y));
    const [first, second] = detail.directions;
    const at = axes(width, height, { low: xLow, high: xHigh, label: `direction 1 (${percent(first)} of the variance)` },
      { low: yLow, high: yHigh, label: `direction 2 (${percent(second)})` });
    at.node.setAttribute("aria-label", `${head.name} in two principal directions`);
    for (const point of points) {
      at.node.append(shape("circle", { class: "dot", cx: at.xOf(point.x), cy: at.yOf(point.y), r: 3, "fill-opacity": 0.8,
        fill: colour(Math.log2(point.position + 1) / most) }));
    }
    hover(at.node, (event, box) => {
      let near = null, distance = 14 ** 2;
      for (const point of points) {
        const away = (at.xOf(point.x) - event.clientX + box.left) ** 2 + (at.yOf(point.y) - event.clientY + box.top) ** 2;
        if (away < distance) [near, distance] = [point, away];
      }
      return near && `${head.name}\nposition ${shown(near.position)}`;
    });
    return at.node;
  });
  return element("div", { class: head.kind }, element("h3", {}, `${KIND_WORDS[head.kind]} vectors (${head.name}) in two principal directions`),
    node, colourBar(scale, "position", shown));
}

function positionView(head, detail, keyHead) {
  const ends = binLabels();
  const series = [head, keyHead].filter(Boolean).flatMap((one) => {
    const own = facts.details[one.name];
    return own && own.by_position ? [{ name: one.name, className: one.kind, y: own.by_position[1], sd: own.by_position[2] }] : [];
  });
  if (!series.length) return null;
  return element("div", {}, element("h3", {}, "Norm by position"), legend(series.map((one) => [one.name, one.className])),
    lineChart({ x: ends.map((_, at) => at), series, xLabel: "position", yLabel: "norm (mean ± sd)", label: `norms of ${head.name} by position`,
      xTicks: ends.map((text, at) => [at, text.split("–")[0]]), xText: (value) => `positions ${ends[value]}` }));
}

function binLabels() {
  return Array.from({ length: facts.bins }, (_, bin) => {
    const first = 2 ** bin - 1, last = Math.min(2 ** (bin + 1) - 2, facts.longest - 1);
    return first >= last ? shown(first) : `${shown(first)}–${shown(last)}`;
  });
}

function attentionView(head, detail) {
  if (!detail.attention) return null;
  const { tokens, positions, weights } = detail.attention;
  const flat = sharesOf(weights);
  const columns = Array.from({ length: tokens }, (_, at) => at);
  const values = positions.map((position, row) => columns.map((key) => (key <= position ? flat[row * tokens + key] : undefined)));
  const scale = { low: 0, high: 1, isLog: false, of: Math.sqrt, at: (share) => share ** 2 };
  return element("div", {}, element("h3", {}, `Attention in example ${facts.example}, positions 0–${tokens - 1}`),
    cellMap({ rows: positions, columns, values, scale, fromTop: true, square: true, most: 12, xLabel: "position of the key",
      yLabel: "position of the query", label: `attention weights of ${head.name}`,
      explain: (row, key) => `query at ${positions[row]}, key at ${key}\nweight ${percent(values[row][key])}` }),
    colourBar(scale, "attention weight (square root)", shown));
}

function distanceView(detail) {
  if (!detail.distance || detail.distance.every((mass) => mass === null)) return null;
  const words = detail.distance.map((_, bin) => {
    const first = 2 ** bin - 1, last = 2 ** (bin + 1) - 2;
    return first === last ? shown(first) : `${shown(first)}–${shown(last)}`;
  });
  return element("div", {}, element("h3", {}, "Attention by distance"), bars(detail.distance, words, "q", "distance of the key", "weight",
    (bin) => `distances ${words[bin]}\nweight ${percent(detail.distance[bin])}`));
}

function channelView(head, detail) {
  if (!detail.rms) return null;
  const values = sharesOf(detail.rms.shares).map((share) => share * detail.rms.scale);
  return element("div", {}, element("h3", {}, `Channels of ${head.name}`), bars(values, values.map((_, at) => shown(at)), head.kind, "channel",
    "root mean square", (channel) => `channel ${channel}\nroot mean square ${shown(Number(values[channel].toPrecision(2)))}`));
}

function bars(values, words, className, xLabel, yLabel, explain, marks) {
  return responsive((width) => {
    const [, high] = extent([...values, ...(marks || [])], true);
    const at = axes(width, 210, { low: -0.5, high: values.length - 0.5, label: xLabel, ticks: words.map((text, place) => [place, text.split("–")[0]]) },
      { low: 0, high, label: yLabel });
    at.node.setAttribute("aria-label", `${yLabel} by ${xLabel}`);
    const each = (at.right - at.left) / values.length;
    const group = shape("g", { class: className });
    values.forEach((value, place) => {
      const x = at.left + place * each, top = at.yOf(value || 0);
      group.append(shape("rect", { class: "fill", x: x + each * 0.08, width: Math.max(0.5, each * 0.84), y: top, height: Math.max(0, at.bottom - top) }));
      if (marks) group.append(shape("line", { class: "mark", x1: x, x2: x + each, y1: at.yOf(marks[place]), y2: at.yOf(marks[place]) }));
    });
    at.node.append(group);
    hover(at.node, (event, box) => {
      const place = Math.floor((event.clientX - box.left - at.left) / each);
      return place >= 0 && place < values.length ? explain(place) : null;
    });
    return at.node;
  });
}
