"use strict";
// The preference front: merges with other shares of the policies, on two axes of rewards, coloured by their KL.

function preferencesSection(run, state, select) {
  const front = run.front;
  const names = front ? Object.keys(byName(front.points, "sft")?.rewards || {}) : [];
  if (!front || !front.preference_front || names.length < 2) return null;
  const lead =
    "Each point is a merge of the policies with the shares beside it, at the largest η within the KL of front.choose; bars are 95 % intervals. " +
    `${better(front, names)} Squares are the SFT model and the policies. Choose a point to read its texts.`;
  const view = state.axes || (state.axes = { x: names[0], y: names[1] });
  const chart = chartBox("Two rewards of merges with other shares of the policies; the table above has their numbers", () => preferencesOption(run, state, view), {
    kind: "tall",
    onClick: (event) => event.data && event.data.point && select(event.data.point),
  });
  chart.id = "preferences-chart";
  const panel = h("div", { class: "card panel", id: "preferences-point", "aria-live": "polite" });
  const show = () => panel.replaceChildren(...pointPanel(run, state));
  show();
  const chooser = (key) => {
    const found = h("select", { id: `preferences-${key}` }, names.map((name) => h("option", { value: name, selected: name === view[key] }, name)));
    found.addEventListener("change", () => {
      view[key] = found.value;
      chart.chart.wanted();
    });
    return h("label", {}, key === "x" ? "to the right" : "up", found);
  };
  const bar = names.length > 2 ? h("div", { class: "bar" }, chooser("x"), chooser("y")) : null;
  const said = isMeasured(front.hypervolume)
    ? h("p", { class: "about", id: "hypervolume", style: { "margin-top": "10px" } }, `Hypervolume ${names.some((name) => front.directions?.[name] < 0) ? "beyond" : "above"} the SFT model: ${format(front.hypervolume)} [${front.hypervolume_ci.map((value) => format(value)).join(", ")}], of ${front.hypervolume_of.join(" and ")}.`)
    : null;
  const result = section("preferences", "Preference front", lead, bar, h("div", { class: "split" }, h("div", { class: "card" }, chart), panel), said);
  result.select = () => {
    show();
    chart.chart.wanted();
  };
  return result;
}

/** What is better in each reward. Without a direction no policy is trained on it, or policies are in both; earlier runs have no directions. */
function better(front, names) {
  const ways = front.directions || Object.fromEntries(names.map((name) => [name, 1]));
  const of = (way) => names.filter((name) => ways[name] === way).join(" and ");
  const untrained = names.filter((name) => !ways[name]).join(" and ");
  if (!of(-1) && !untrained) return "Upper right is better in both rewards.";
  const said = [of(1) && `more of ${of(1)} is better`, of(-1) && `less of ${of(-1)} is better`, untrained && `no direction of ${untrained} is better`];
  const text = said.filter(Boolean).join("; ");
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

/** The shares of a merge, as short as they are told apart: 0.75/0.25. */
function sharesOf(point) {
  return Object.values(point.weights).map((share) => String(Math.round(share * 1e3) / 1e3)).join("/");
}

function preferencesOption(run, state, view) {
  const points = run.front.points;
  const merges = run.front.preference_front.map((name) => byName(points, name)).filter(Boolean);
  const others = points.filter((point) => point.name === "sft" || /^policy \d+$/.test(point.name));
  const both = [...merges, ...others].filter((point) => point.rewards && isMeasured(point.rewards[view.x]) && isMeasured(point.rewards[view.y]));
  const place = (point) => [point.rewards[view.x], point.rewards[view.y], point.kl];
  const half = (point, name) => (point.rewards_ci || {})[name] || 0;
  const dots = (some) => some.filter((point) => both.includes(point)).map((point) => ({ value: place(point), point: point.name }));
  const label = (position, text) => ({ show: true, position, distance: 8, fontSize: 11.5, color: colour("soft"), formatter: (item) => text(byName(points, item.data.point)) });
  const ring = (name, size, style) => {
    const point = both.find((one) => one.name === name);
    return point && { type: "scatter", silent: true, data: [place(point)], symbol: "circle", symbolSize: size, itemStyle: { color: "transparent", ...style }, z: 6, tooltip: { show: false } };
  };
  const kls = both.map((point) => point.kl);
  const series = [
    { ...errorBars(both.map((p) => [...place(p).slice(0, 2), half(p, view.x), half(p, view.y), colour("faint")])) },
    { type: "line", data: Object.keys(byName(points, "sft").rewards).length === 2 ? dots(merges) : [], symbol: "none", silent: true, color: colour("accent"), lineStyle: { width: 1.4, opacity: 0.6 }, z: 2 },
    { type: "scatter", name: "merges", data: dots(merges), symbolSize: 13, label: label("top", sharesOf), labelLayout: { hideOverlap: true }, z: 4 },
    { type: "scatter", data: dots(others), symbol: "rect", symbolSize: 10, color: colour("soft"), label: label("bottom", pointLabel), labelLayout: { hideOverlap: true }, z: 3 },
    ring(run.front.chosen, 22, { borderColor: colour("ink"), borderWidth: 1.6 }),
    ring(state.point, 29, { borderColor: colour("accent"), borderWidth: 2.5, opacity: 0.9 }),
  ].filter(Boolean);
  return {
    grid: { left: 58, right: 84, top: 24, bottom: 48 },
    xAxis: axis(view.x, { nameGap: 28 }),
    yAxis: axis(view.y, { nameGap: 40 }),
    visualMap: { type: "continuous", dimension: 2, seriesIndex: [2, 3], min: 0, max: Math.max(...kls), right: 4, top: "middle", itemHeight: 110, itemWidth: 12, precision: 1, calculable: true, text: ["KL, nats", ""], textStyle: { color: colour("soft"), fontSize: 11 }, inRange: { color: ["#440154", "#31688e", "#35b779", "#fde725"] } },
    tooltip: tooltip((item) => preferencesTip(item, points, run), { trigger: "item" }),
    series,
  };
}

function preferencesTip(item, points, run) {
  const point = item.data && byName(points, item.data.point);
  if (!point) return [];
  const rewards = Object.entries(point.rewards).map(([name, mean]) => `${name} ${interval(mean, (point.rewards_ci || {})[name])}`);
  return [pointLabel(point) + (run.front.chosen === point.name ? " (chosen)" : ""), ...rewards, `KL ${interval(point.kl, point.kl_ci)} nats`, ...(isMeasured(point.liti) ? [`η ${format(point.liti)}`] : [])];
}
