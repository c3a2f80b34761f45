"use strict";
// Learning curves: a chart per metric, iterations laid one after another, a colour per policy.

function curvesSection(run, state) {
  const lead = "Steps are counted through all iterations; a vertical line is where policies were merged and a new init began. One colour per policy.";
  if (!run.curves || !run.curves.metrics.length) return section("curves", "Learning curves", lead, h("p", { class: "empty" }, "No step has been finished yet."));
  const view = state.curves || (state.curves = { smoothing: 0, hidden: new Set() });
  const offsets = iterationOffsets(run);
  const boxes = run.curves.metrics.map((metric) => {
    const chart = chartBox(`${metric.title} over steps`, () => curveOption(run, metric, view, offsets));
    const unit = metric.unit ? h("span", { class: "about" }, ` ${metric.unit}`) : null;
    return h("div", { class: "card" }, h("h3", {}, metric.title, unit), h("p", { class: "about" }, metric.about), chart);
  });
  const redraw = () => boxes.forEach((box) => box.querySelector(".chart").chart.wanted());
  const slider = h("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: String(view.smoothing), "aria-label": "Smoothing" });
  slider.addEventListener("input", () => ((view.smoothing = Number(slider.value)), redraw()));
  const policies = [...new Set(run.curves.curves.map((curve) => curve.policy))].sort((a, b) => a - b);
  const chips = policies.map((policy) => {
    const chip = h("button", { type: "button", class: "chip", "aria-pressed": String(!view.hidden.has(policy)), style: { "--dot": `var(--c${(policy - 1) % 8})` } }, h("i", {}), `policy ${policy}`);
    chip.addEventListener("click", () => {
      if (!view.hidden.delete(policy)) view.hidden.add(policy);
      chip.setAttribute("aria-pressed", String(!view.hidden.has(policy)));
      redraw();
    });
    return chip;
  });
  const { stretch, steps } = run.curves;
  const note = stretch > 1 ? `${steps.toLocaleString("en-US")} steps in all; each point is the mean of up to ${stretch} of them, the band their least and largest value.` : `${steps.toLocaleString("en-US")} steps in all, every one drawn.`;
  const bar = h("div", { class: "bar" }, h("label", {}, "Smoothing", slider), h("div", { role: "group", "aria-label": "Policies", class: "bar", style: { margin: "0" } }, chips));
  return section("curves", "Learning curves", lead, bar, h("div", { class: "grid" }, boxes), h("p", { class: "about", id: "curves-note", style: { "margin-top": "10px" } }, note));
}

/** iteration → steps before it. */
function iterationOffsets(run) {
  const lengths = new Map();
  for (const curve of run.curves.curves) lengths.set(curve.iteration, Math.max(lengths.get(curve.iteration) || 0, curve.last + 1));
  const planned = run.planned && Math.max(...run.planned.policy_steps);
  const offsets = new Map();
  let before = 0;
  for (const iteration of [...lengths.keys()].sort((a, b) => a - b)) {
    offsets.set(iteration, before);
    before += Math.max(lengths.get(iteration), planned || 0);
  }
  return offsets;
}

function curveOption(run, metric, view, offsets) {
  const series = [];
  for (const curve of run.curves.curves.filter((one) => !view.hidden.has(one.policy))) {
    const values = curve.values[metric.name];
    const at = (n) => curve.steps[n] + 1 + offsets.get(curve.iteration);
    const own = policyColour(curve.policy);
    const pairs = (list) => list.map((value, n) => [at(n), value]).filter((pair) => pair[1] !== null);
    if (values.low && values.low.length) {
      series.push({ ...band(curve.steps.map((_, n) => [at(n), values.low[n], values.high[n]]).filter((row) => row[1] !== null), own), name: "band" });
    }
    const raw = pairs(values.mean);
    const label = { iteration: curve.iteration, policy: curve.policy, offset: offsets.get(curve.iteration) };
    if (view.smoothing) series.push({ type: "line", data: raw, symbol: "none", silent: true, lineStyle: { color: own, width: 1, opacity: 0.22 }, tooltip: { show: false }, name: "raw" });
    const data = smoothed(raw, view.smoothing);
    series.push({ type: "line", data, name: JSON.stringify(label), color: own, showSymbol: raw.length < 2, symbolSize: 5, lineStyle: { width: 1.6 }, z: 3 });
  }
  if (series.length) {
    const marks = [...offsets].filter(([, offset]) => offset > 0).map(([iteration, offset]) => ({ xAxis: offset + 0.5, name: `iteration ${iteration}` }));
    series[series.length - 1].markLine = {
      silent: true, symbol: "none", data: marks, lineStyle: { color: colour("faint"), type: "dashed", width: 1, opacity: 0.6 },
      label: { formatter: (mark) => (offsets.size > 4 ? mark.name.split(" ")[1] : mark.name), color: colour("faint"), fontSize: 10.5, position: "end", distance: 3 },
    };
  }
  return {
    grid: { left: 46, right: 14, top: 18, bottom: 24 },
    xAxis: axis("", { scale: false, min: 0, splitLine: { show: false } }),
    yAxis: axis(""),
    tooltip: tooltip((items) => curveTip(items), { trigger: "axis", axisPointer: { lineStyle: { color: colour("faint") }, snap: true } }),
    series,
  };
}

function curveTip(items) {
  const named = items.filter((item) => item.seriesName.startsWith("{"));
  if (!named.length) return [];
  const first = JSON.parse(named[0].seriesName);
  const lines = named.slice(0, 12).map((item) => `policy ${JSON.parse(item.seriesName).policy}: ${format(item.data[1], 3)}`);
  return [`iteration ${first.iteration}, step ${Math.round(named[0].data[0] - first.offset)}`, ...lines];
}

/** Exponential moving average with TensorBoard's correction of the beginning. */
function smoothed(pairs, weight) {
  if (!weight) return pairs;
  let [mean, mass] = [0, 0];
  return pairs.map(([x, y]) => {
    mean = weight * mean + (1 - weight) * y;
    mass = weight * mass + (1 - weight);
    return [x, mean / mass];
  });
}

/** The area between least and largest value; rows are [x, low, high]. */
function band(rows, own) {
  return {
    type: "custom", silent: true, z: 1, clip: true, data: rows.length ? [[rows[0][0], rows[0][1]]] : [], encode: { x: 0, y: 1 }, tooltip: { show: false },
    renderItem: (_, api) => {
      const points = [...rows.map((row) => api.coord([row[0], row[2]])), ...rows.map((row) => api.coord([row[0], row[1]])).reverse()];
      return { type: "polygon", shape: { points }, style: { fill: own, opacity: 0.14 } };
    },
  };
}
