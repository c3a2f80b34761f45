"use strict";
// Angles between the policies' task vectors and ratios of their norms, per transformer block and iteration.

function geometrySection(run) {
  const lead =
    "Task vectors θₘ − θ_init of each pair of policies, per block. Near 90° they are independent, and averaging on the sphere keeps the length that a plain mean loses; " +
    "near 0° the policies went the same way. A norm ratio far from 1 means that one of the two went much further.";
  const rows = run.geometry.filter((one) => one.pairs.length);
  if (!rows.length) {
    const why = run.geometry.length ? "There is one policy per iteration, so nothing to compare." : "No iteration has been merged yet.";
    return section("geometry", "Angles and norms", lead, h("p", { class: "empty" }, why));
  }
  const lines = rows.flatMap((one) => one.pairs.map((pair, n) => ({ name: rows.length > 1 ? `it ${one.iteration} · ${pair}` : pair, angles: one.angles[n], ratios: one.ratios[n], iteration: one.iteration, pair })));
  const blocks = rows[0].blocks.map(blockName);
  const height = Math.max(150, Math.min(14 * lines.length, 900) + 96);
  const spread = (values) => {
    const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
    return sorted.length ? [sorted[0], sorted[Math.floor(sorted.length / 2)], sorted[sorted.length - 1]] : [null, null, null];
  };
  const angles = spread(lines.flatMap((line) => line.angles));
  const ratios = spread(lines.flatMap((line) => line.ratios));
  const far = Math.max(10, ...angles.map((angle) => Math.abs((angle ?? 90) - 90)));
  const factor = Math.max(1.2, ...ratios.filter(Boolean).map((ratio) => Math.max(ratio, 1 / ratio)));
  const heat = (key, title, unit, digits, low, high, place) =>
    chartBox(`${title} of every pair and block`, () => heatOption(lines, blocks, key, title, unit, digits, low, high, place), { height });
  const card = (title, about, chart) => h("div", { class: "card" }, h("h3", {}, title), h("p", { class: "about" }, about), chart);
  const angleText = `${format(angles[0], 0)}° to ${format(angles[2], 0)}°, median ${format(angles[1], 0)}°`;
  const ratioText = `${format(ratios[0])} to ${format(ratios[2])}, median ${format(ratios[1])}`;
  return section(
    "geometry", "Angles and norms", lead, mergeTable(rows),
    h("div", { class: "pair" },
      card("Angles", angleText, heat("angles", "angle", "°", 1, Math.max(0, 90 - far), Math.min(180, 90 + far), (value) => value)),
      card("Norm ratios", ratioText, heat("ratios", "norm ratio", "", 2, -Math.log(factor), Math.log(factor), Math.log))),
  );
}

/** What the policies do alike, whatever their angles: the KL cosine of each merge and what it allows. */
function mergeTable(rows) {
  const known = rows.filter((one) => one.merge && isMeasured(one.merge.kl_cosine));
  if (!known.length) return null;
  const about =
    "The KL cosine says how alike the policies changed the texts: 1 is the same, 0 independent. Averaging removes only what differs between them, so it can save at most this share of √KL.";
  const row = ({ iteration, merge }) => {
    const cells = [interval(merge.kl_cosine, merge.kl_cosine_ci), `up to ${percent(merge.kl_gain)} of √KL`, `${format(merge.kl_lerp)} nats`];
    return h("tr", {}, h("td", {}, `iteration ${iteration}`), cells.map((cell) => h("td", { class: "number" }, cell)));
  };
  const head = ["merge", "KL cosine", "averaging can save", "KL of the mean to the init"].map((name, n) => h("th", { scope: "col", class: n ? "number" : "" }, name));
  const table = h("table", { id: "merges" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, known.map(row)));
  return h("div", { class: "card", style: { "margin-bottom": "16px" } }, h("h3", {}, "KL cosine of the merges"), h("p", { class: "about" }, about), h("div", { class: "scroll" }, table));
}

function blockName(name) {
  const digits = name.match(/(\d+)(?!.*\d)/);
  return digits ? digits[1] : name;
}

function heatOption(lines, blocks, key, title, unit, digits, low, high, place) {
  const data = lines.flatMap((line, y) => line[key].map((value, x) => [x, y, value === null ? null : place(value), value])).filter((cell) => cell[2] !== null);
  const category = (names, more) => ({
    type: "category", data: names, axisLine: { show: false }, axisTick: { show: false }, splitArea: { show: false },
    axisLabel: { color: colour("faint"), fontSize: 10.5 }, nameTextStyle: { color: colour("soft"), fontSize: 12 }, ...more,
  });
  const back = key === "ratios" ? Math.exp : (value) => value;
  return {
    grid: { left: 66, right: 12, top: 8, bottom: 84 },
    xAxis: category(blocks, { name: "transformer block", nameLocation: "middle", nameGap: 24 }),
    yAxis: category(lines.map((line) => line.name), { inverse: true }),
    tooltip: tooltip((item) => {
      const line = lines[item.data[1]];
      return [`${format(item.data[3], digits)}${unit}`, `iteration ${line.iteration}, policies ${line.pair}`, `block ${blocks[item.data[0]]}`];
    }, { trigger: "item" }),
    visualMap: {
      min: low, max: high, dimension: 2, orient: "horizontal", left: "center", bottom: 0, itemWidth: 10, itemHeight: 160, calculable: false,
      text: [`${format(back(high), key === "ratios" ? 2 : 0)}${unit}`, `${format(back(low), key === "ratios" ? 2 : 0)}${unit}`],
      textStyle: { color: colour("faint"), fontSize: 11 }, inRange: { color: [colour("low"), colour("middle"), colour("high")] },
    },
    series: [{ type: "heatmap", data, progressive: 0, itemStyle: { borderColor: colour("card"), borderWidth: blocks.length > 40 ? 0 : 1 }, emphasis: { itemStyle: { borderColor: colour("ink"), borderWidth: 1 } } }],
  };
}
