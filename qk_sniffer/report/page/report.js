// Puts the sections of the report together.

function definitions(pairs) {
  return element("dl", { class: "facts" }, ...pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function captureSection() {
  const proof = facts.proof;
  const className = { proven: "good", failed: "bad" }[proof.state] || "unsure";
  const words = proof.state === "proven"
    ? ["The job derived vectors a second time, by hooks on a plain forward pass, and compared:",
      `They differ by ${shown(proof.largest)} at most (relative); up to ${shown(proof.tolerance)} counts as rounding.`]
    : ["", ""];
  const differences = proof.differences && proof.differences.some(([, value]) => value > 0) ? element("div", {},
    lineChart({ x: proof.differences.map(([layer]) => layer), xLabel: "layer", yLabel: "relative difference",
      logY: proof.differences.every(([, value]) => value > 0), height: 170,
      label: "largest relative difference of the proof by layer", xText: (layer) => `layer ${layer}`,
      xTicks: proof.differences.map(([layer]) => [layer, String(layer)]),
      series: [{ name: "difference", className: "", y: proof.differences.map(([, value]) => value) }] })) : null;
  return element("section", { id: "capture" }, element("div", { class: "columns" },
    element("div", {}, element("h2", {}, "What was captured"), definitions(facts.about)),
    element("div", {}, element("h2", {}, "Proof ", element("span", { class: `badge ${className}` }, proof.state)),
      words[0] ? element("p", {}, words[0]) : null,
      element("ul", {}, ...proof.words.map((text) => element("li", {}, text))),
      words[1] ? element("p", {}, words[1]) : null, differences)));
}

function coverageSection() {
  if (!facts.coverage.length) return null;
  return element("section", { id: "coverage" }, element("h2", {}, "Coverage"),
    element("p", { class: "quiet" }, "Rows by bucket of positions, over all heads of a kind. A line marks the number that the sampler is expected to keep."),
    element("div", { class: "columns" }, ...facts.coverage.map((one) => {
      const words = one.buckets.map((line) => line.bucket);
      return element("div", {}, element("h3", {}, `${one.name} rows`), element("p", {}, verdict(one)),
        bars(one.buckets.map((line) => line.rows), words, one.kind, "bucket", "rows", (place) => {
          const line = one.buckets[place];
          return `bucket ${line.bucket}, positions ${line.positions}\nrows: ${shown(line.rows)}\nexpected: ${one.limit ? "at most " : ""}` +
            `${shown(Math.round(line.expected))}${line.sd ? ` ± ${shown(Math.round(line.sd))}` : ""}`;
        }, one.buckets.map((line) => line.expected)),
        element("details", {}, element("summary", {}, "table"), tableOf(["bucket", "positions", "p", "rows", "expected", "± sd"],
          one.buckets.map((line) => [line.bucket, line.positions, shown(line.p), shown(line.rows), shown(Math.round(line.expected)), shown(Math.round(line.sd))]))));
    })));
}

function verdict(one) {
  if (one.limit) return `The expected number is an upper bound: ${one.limit}.`;
  let worst = 0, place = null;
  const telling = one.buckets.filter((line) => line.is_telling);
  if (!telling.length) return "Too few rows are expected to compare their numbers.";
  for (const line of telling) {
    const away = line.rows - line.expected;
    const deviations = line.sd ? Math.abs(away) / line.sd : Math.abs(away) > 0.5 + 1e-3 * line.expected ? Infinity : 0;
    if (deviations > worst) [worst, place] = [deviations, line];
  }
  if (!place) return "Every bucket has exactly the expected rows.";
  if (worst === Infinity) return `Bucket ${place.bucket} has ${shown(place.rows)} rows, and ${shown(Math.round(place.expected))} are expected.`;
  return `The largest deviation is ${worst.toFixed(1)} standard deviations, in bucket ${place.bucket}${worst > 4 ? ": more than chance explains" : ""}` +
    `${telling.length < one.buckets.length ? ", of the buckets with enough expected rows" : ""}.`;
}

function normsSection() {
  const layered = facts.norms.map((one) => {
    const mean = one.heads.map(meanOf);
    return { name: `${one.name}: sampled rows`, className: one.kind, layers: one.layers, y: mean,
      dots: one.heads.flatMap((heads, at) => heads.map((norm) => [one.layers[at], norm])) };
  });
  for (const one of facts.all_norms) {
    layered.push({ name: `${one.name} of all tokens, ${one.stage}`, className: one.kind, layers: one.layers, y: one.mean, sd: one.sd, dashed: true });
  }
  if (!layered.length) return null;
  const layers = [...new Set(layered.flatMap((one) => one.layers))].sort((one, other) => one - other);
  const series = layered.map((one) => ({ ...one, y: layers.map((layer) => one.layers.includes(layer) ? one.y[one.layers.indexOf(layer)] : null),
    sd: one.sd && layers.map((layer) => one.layers.includes(layer) ? one.sd[one.layers.indexOf(layer)] : null) }));
  const kinds = [...new Set(facts.norms.map((one) => one.kind))];
  return element("section", { id: "norms" }, element("h2", {}, "Norms"), element("div", { class: "columns" },
    element("div", {}, element("h3", {}, "By layer"), legend(kinds.map((kind) => [KIND_WORDS[kind], kind])),
      element("p", { class: "quiet small" }, "Mean over the heads of a layer; a dot is the mean of a head." +
        (facts.all_norms.length ? " Dashed: over all tokens, with the standard deviation." : "")),
      lineChart({ x: layers, series, xLabel: "layer", yLabel: "Euclidean norm", label: "norms by layer", xText: (layer) => `layer ${layer}`,
        xTicks: layers.map((layer) => [layer, String(layer)]) })),
    ...facts.norms.map(normMap)));
}

function normMap(one) {
  const ends = binLabels();
  const scale = scaleOf(one.by_position.flat());
  return element("div", { class: one.kind }, element("h3", {}, `${one.name} norm by layer and position`),
    cellMap({ rows: one.layers, columns: ends.map((text) => text.split("–")[0]), values: one.by_position, scale, xLabel: "position, from", yLabel: "layer", most: 24,
      label: `${one.name} norms by layer and position`,
      explain: (row, bin) => `layer ${one.layers[row]}, positions ${ends[bin]}\nmean norm ${shown(one.by_position[row][bin])}` }),
    colourBar(scale, "mean norm"));
}

function meanOf(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function outlierSection() {
  if (!facts.channels.length && !facts.outliers.length) return null;
  return element("section", { id: "outliers" }, element("h2", {}, "Outlier channels"),
    element("p", { class: "quiet" }, "A channel is one number of a head's vector. The maps show the largest absolute value over the heads of a layer. " +
      "The list has the root mean square (rms) of a head's largest channel, also over that of the median one."),
    element("div", { class: "columns" }, ...facts.channels.map((one) => {
      const scale = scaleOf(one.values.flat());
      const width = Math.max(...one.values.map((row) => row.length));
      return element("div", {}, element("h3", {}, `${one.name} channels`),
        cellMap({ rows: one.layers, columns: Array.from({ length: width }, (_, at) => at), values: one.values, scale, most: 18, xLabel: "channel", yLabel: "layer",
          label: `largest absolute values of ${one.name} channels by layer`,
          explain: (row, channel) => `layer ${one.layers[row]}, channel ${channel}\nlargest |value| ${shown(one.values[row][channel])}` }),
        colourBar(scale, "largest |value|"));
    }),
    element("div", {}, element("h3", {}, "Heads with the strongest one"),
      tableOf(["head", "channel", "× median", "rms", "max"], facts.outliers.map((one) => [
        element("button", { type: "button", class: "link", click: () => { choose(one.head); document.getElementById("heads").scrollIntoView(); } }, one.head),
        shown(one.channel), shown(one.ratio), shown(one.rms), shown(one.largest)])))));
}

function rotarySection() {
  if (!facts.rotary.length) return null;
  const longest = Math.max(...facts.rotary.map((one) => one.wavelengths.length));
  const x = Array.from({ length: longest }, (_, at) => at);
  const classes = ["q", "k", "v", "o"];
  const series = facts.rotary.map((one, at) => ({ name: one.name, className: classes[at % 4], dashed: at >= 4, y: x.map((place) => one.wavelengths[place] ?? null) }));
  series.push({ name: "longest text", className: "plain", dashed: true, y: x.map(() => facts.longest) });
  const turning = facts.rotary.map((one) => {
    const slow = one.wavelengths.filter((length) => length === null || length > facts.longest).length;
    return `${one.name}: ${one.wavelengths.length} frequencies, ${slow} of them turn less than once in the longest text` +
      (one.scaling === 1 ? "" : `; attention scaling ${shown(one.scaling)}`);
  });
  return element("section", { id: "rotary" }, element("h2", {}, "Rotary frequencies"), element("div", { class: "columns" },
    element("div", {}, element("h3", {}, "Wavelengths"), legend(series.map((one) => [one.name, one.className])),
      lineChart({ x, series, xLabel: "rotary frequency (0: the fastest)", yLabel: "tokens a turn", logY: true, label: "wavelengths of the rotary frequencies",
        xText: (place) => `frequency ${place}` }),
      element("ul", {}, ...turning.map((text) => element("li", {}, text)))),
    ...facts.rotary_maps.flatMap((one) => [["concentration", "concentration of the direction before RoPE"], ["modulus", "mean modulus before RoPE"]].map(([part, words]) => {
      const scale = scaleOf(one[part].flat());
      return element("div", {}, element("h3", {}, `${one.name} vectors: ${words}`),
        cellMap({ rows: one.layers, columns: Array.from({ length: Math.max(...one[part].map((row) => row.length)) }, (_, at) => at), values: one[part], scale, most: 22,
          xLabel: "rotary frequency (0: the fastest)", yLabel: "layer", label: `${one.name} ${words}`,
          explain: (row, place) => `layer ${one.layers[row]}, frequency ${place}\n${part}: ${shown(one[part][row][place])}` }),
        colourBar(scale, part));
    }))));
}

function timingSection() {
  const shownStages = facts.timings.filter(([, seconds]) => seconds >= 0.001);
  if (!shownStages.length) return null;
  const total = shownStages.reduce((sum, [, seconds]) => sum + seconds, 0);
  const chart = responsive((width) => {
    const left = Math.min(150, width * 0.4), most = shownStages[0][1];
    const node = shape("svg", { width, height: shownStages.length * 20 + 4, role: "img", "aria-label": "seconds by stage" });
    shownStages.forEach(([stage, seconds], at) => {
      const long = Math.max(1, ((width - left - 70) * seconds) / most);
      node.append(shape("text", { x: left - 6, y: at * 20 + 14, "text-anchor": "end" }, stage),
        shape("rect", { class: "fill", x: left, y: at * 20 + 4, width: long, height: 12, rx: 2 }),
        shape("text", { x: left + long + 5, y: at * 20 + 14 }, `${shown(Number(seconds.toPrecision(3)))} s`));
    });
    return node;
  });
  return element("section", { id: "timings" }, element("h2", {}, "Timings"),
    element("p", { class: "quiet" }, `The run that finished the dataset took ${shown(Math.round(total))} s in its main thread.`), chart);
}

function themeButton() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const again = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    redraws.forEach((redraw) => redraw());
  };
  const button = element("button", { type: "button", click: () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    again();
  } }, isDark() ? "Light" : "Dark");
  dark.addEventListener("change", again);
  return button;
}

function show() {
  document.title = `${facts.title}: report`;
  const sections = [captureSection(), headsSection(), coverageSection(), normsSection(), outlierSection(), rotarySection(), timingSection()].filter(Boolean);
  document.body.append(
    element("header", {}, element("div", {}, element("h1", {}, facts.title), element("p", { class: "quiet" }, facts.place)), themeButton()),
    element("nav", {}, ...sections.map((section) => element("a", { href: `#${section.id}` }, section.querySelector("h2").firstChild.textContent.trim()))),
    ...sections, tip);
  document.body.dataset.ready = "yes";
}

show();
