"use strict";
// The KL–reward front: every point with its error, the way of each policy while it trained, and the texts of the point that is chosen.

const SHOWN_SAMPLES = 6;

function frontSection(run, runs, state, select) {
  const lead =
    "Each point is a model, measured on held-out prompts with the same sampling. To the right is further from the SFT model, up is more reward; bars are 95 % " +
    "intervals. The line is the front: η = 0 is SFT, η = 1 the SLERP merge; beyond it, dashed and hollow, is extrapolation. The other dashed line is the ceiling: the most reward that any policy can have there. Thin lines are the policies while they trained (" + (run.trajectories.some((one) => one.held_out) ? "on held-out prompts of their own" : "means over training prompts") + "). " +
    "Choose a point to read its texts.";
  if (!run.front && !run.trajectories.some((one) => one.points.length)) {
    return section("front", "KL–reward front", lead, h("p", { class: "empty" }, "Nothing has been measured yet."));
  }
  const names = run.front ? run.front.points.map((point) => point.name) : [];
  const move = (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by || !names.length) return;
    event.preventDefault();
    select(names[(names.indexOf(state.point) + by + names.length) % names.length]);
  };
  const chart = chartBox("KL–reward front; arrow keys choose a point, the table below has its numbers", () => frontOption(run, runs, state), {
    kind: "tall",
    onClick: (event) => event.data && event.data.point && select(event.data.point),
    onKey: move,
  });
  chart.id = "front-chart";
  const panel = h("div", { class: "card panel", id: "point", "aria-live": "polite" });
  const table = h("div", { class: "scroll", id: "points" });
  const show = () => {
    panel.replaceChildren(...pointPanel(run, state));
    table.replaceChildren(run.front ? pointTable(run, state, select) : "");
  };
  show();
  const parts = [h("div", { class: "split" }, h("div", { class: "card" }, chart), panel)];
  if (run.front && run.front.ceiling) parts.push(h("p", { class: "about", id: "share", style: { "margin-top": "10px" } }, `${run.front.ceiling.said}. The ceiling follows from ${run.front.ceiling.completions} SFT completions of each of ${run.front.ceiling.prompts} prompts.`));
  if (run.front) parts.push(h("div", { style: { "margin-top": "16px" } }, table));
  const result = section("front", "KL–reward front", lead, ...parts);
  result.select = () => {
    show();
    chart.chart.wanted();
  };
  return result;
}

function pointStyle(point) {
  if (point.name === "sft") return { symbol: "circle", colour: colour("soft"), size: 12 };
  if (point.name === "lerp") return { symbol: "diamond", colour: colour("c1"), size: 15 };
  if (point.extrapolated) return { symbol: "emptyCircle", colour: colour("accent"), size: 11 };
  if (point.eta !== null) return { symbol: "circle", colour: colour("accent"), size: point.name === "slerp" ? 15 : 11 };
  return { symbol: "rect", colour: policyColour(Number(point.name.split(" ")[1]) || 1), size: 11 };
}

function pointLabel(point) {
  if (point.name === "sft") return "SFT";
  if (point.name === "slerp") return "SLERP";
  if (point.name === "lerp") return "LERP";
  return point.eta !== null ? `η ${point.eta}` : point.name;
}

function frontOption(run, runs, state) {
  const points = run.front ? run.front.points.filter((point) => !point.weights) : []; // the others are in preferences.js
  const line = points.filter((point) => point.eta !== null).sort((a, b) => a.eta - b.eta);
  const dot = (point, more = {}) => {
    const style = pointStyle(point);
    return { value: [point.kl, point.reward], point: point.name, symbol: style.symbol, symbolSize: style.size, itemStyle: { color: style.colour }, ...more };
  };
  const label = (position) => ({ show: true, position, distance: 9, fontSize: 11.5, color: colour("soft"), formatter: (item) => pointLabel(byName(points, item.data.point)) });
  const series = [];
  const last = Math.max(0, ...run.trajectories.map((one) => one.iteration));
  for (const way of run.trajectories.filter((one) => one.points.length)) {
    series.push({
      name: "training", type: "line", data: way.points.map((point) => ({ value: point.slice(0, 2), way, at: point })), color: policyColour(way.policy), symbol: "circle", symbolSize: 3, triggerEvent: true, z: 1,
      lineStyle: { width: 1.2, opacity: way.iteration === last ? 0.5 : 0.2 }, itemStyle: { opacity: way.iteration === last ? 0.5 : 0.2 },
    });
  }
  runs.filter((other) => other !== run && other.front).forEach((other, n) => {
    const own = other.front.points.filter((point) => point.eta !== null).sort((a, b) => a.eta - b.eta);
    series.push({
      name: other.name, type: "line", symbol: "emptyCircle", symbolSize: 6, color: colour(`c${(n + 1) % 8}`), lineStyle: { width: 1.5, type: [6, 3] }, z: 2,
      data: own.map((point) => ({ value: [point.kl, point.reward], other: other.name, measured: point })),
    });
  });
  if (run.front && run.front.ceiling) series.push(...ceilingSeries(run.front.ceiling));
  const inside = line.filter((p) => !p.extrapolated);
  const front = { type: "line", color: colour("accent"), label: label("top"), labelLayout: { hideOverlap: true } };
  series.push({ ...front, name: "front", data: inside.map((p) => dot(p)), lineStyle: { width: 2.2 }, z: 4 });
  if (inside.length < line.length) series.push({ ...front, name: "extrapolated", data: line.slice(inside.length - 1).map((p) => dot(p, p.extrapolated ? {} : { symbol: "none" })), lineStyle: { width: 2.2, type: [6, 4] }, z: 3 });
  series.push({ ...errorBars(points.map((p) => [p.kl, p.reward, p.kl_ci, p.reward_ci, pointStyle(p).colour])), name: "front" });
  series.push({ name: "policies, LERP", type: "scatter", data: points.filter((p) => p.eta === null).map((p) => dot(p)), color: colour("c1"), label: label("bottom"), labelLayout: { hideOverlap: true, moveOverlap: "shiftY" }, z: 5 });
  const ring = (name, size, style) => {
    const point = byName(points, name);
    return point && { type: "scatter", silent: true, data: [[point.kl, point.reward]], symbol: "circle", symbolSize: size, itemStyle: { color: "transparent", ...style }, z: 6, tooltip: { show: false } };
  };
  const rings = [ring(run.front && run.front.chosen, 22, { borderColor: colour("ink"), borderWidth: 1.6 }), ring(state.point, 29, { borderColor: colour("accent"), borderWidth: 2.5, opacity: 0.9 })];
  series.push(...rings.filter(Boolean));
  const legend = [...new Set(series.map((one) => one.name).filter(Boolean))];
  return {
    grid: { left: 58, right: 22, top: 40, bottom: 48 },
    legend: { data: legend, top: 0, left: 0, type: "scroll", textStyle: { color: colour("soft"), fontSize: 12 }, itemWidth: 18, itemHeight: 9, pageTextStyle: { color: colour("soft") }, pageIconColor: colour("soft") },
    xAxis: axis("KL(policy ‖ SFT), nats per completion", { nameGap: 28 }),
    yAxis: axis("reward", { nameGap: 40 }),
    tooltip: tooltip((item) => frontTip(item, points, run), { trigger: "item" }),
    series,
  };
}

/** The most reward at each KL as a line with its band, and best of n as triangles. */
function ceilingSeries(ceiling) {
  const own = colour("c3");
  const rows = ceiling.kl.map((kl, n) => [kl, ceiling.reward[n] - ceiling.reward_ci[n], ceiling.reward[n] + ceiling.reward_ci[n]]);
  const line = ceiling.kl.map((kl, n) => ({ value: [kl, ceiling.reward[n]], ceiling: [ceiling.reward[n], ceiling.reward_ci[n]] }));
  const best = ceiling.best_of.map((one) => ({ value: [one.kl, one.reward], best: one }));
  return [
    { ...band(ceiling.reward_ci[0] === null ? [] : rows, own), name: "ceiling" },
    { name: "ceiling", type: "line", data: line, color: own, symbol: "circle", symbolSize: 3, lineStyle: { width: 1.6, type: [6, 4] }, z: 3 },
    { name: "best of n", type: "scatter", data: best, color: own, symbol: "triangle", symbolSize: 7, z: 3, label: { show: true, position: "right", fontSize: 10.5, color: colour("faint"), formatter: (item) => `best of ${item.data.best.n}` }, labelLayout: { hideOverlap: true } },
  ];
}

/** Whether a value is there: runs of earlier versions lack some. */
function isMeasured(value) {
  return value !== null && value !== undefined;
}

function byName(points, name) {
  return points.find((point) => point.name === name);
}

function frontTip(item, points, run) {
  if (item.data && item.data.way) return trajectoryTip(item.data.way, item.data.at);
  if (item.data && item.data.ceiling) return ["ceiling", `reward ${interval(...item.data.ceiling)}`, `KL ${format(item.data.value[0])} nats`];
  if (item.data && item.data.best) return [`best of ${item.data.best.n}`, `reward ${interval(item.data.best.reward, item.data.best.reward_ci)}`, `KL at most ${format(item.data.best.kl)} nats`];
  const point = (item.data && item.data.measured) || (item.data && byName(points, item.data.point));
  if (!point) return [];
  const lines = [item.data.other ? `${item.data.other}: ${pointLabel(point)}` : pointLabel(point) + (run.front.chosen === point.name ? " (chosen)" : "")];
  lines.push(`reward ${interval(point.reward, point.reward_ci)}`, `KL ${interval(point.kl, point.kl_ci)} nats`);
  if (point.control !== null) lines.push(`control ${interval(point.control, point.control_ci)}`);
  const share = !item.data.other && run.front.ceiling && run.front.ceiling.shares[point.name];
  if (share) lines.push(`of the ceiling: ${share}`);
  if (isMeasured(point.retention)) lines.push(`retention ${interval(point.retention, point.retention_ci)} nats per token`);
  if (point.extrapolated) lines.push("extrapolated beyond SLERP");
  return [...lines, `${format(point.length, 1)} tokens, distinct-2 ${format(point.distinct_2)}`];
}

function trajectoryTip(way, [kl, reward, step, klError, rewardError, control, controlError]) {
  const who = `iteration ${way.iteration}, policy ${way.policy}`;
  if (!way.held_out) return [`${who}, step ${Math.round(step) + 1}`, `reward ${format(reward)}`, `KL to SFT ${format(kl)} nats`];
  const lines = [`${who}, after ${step} steps`, `reward ${interval(reward, rewardError)}`, `KL to SFT ${interval(kl, klError)} nats`];
  return control === null ? lines : [...lines, `control ${interval(control, controlError)}`];
}

function pointTable(run, state, select) {
  const control = run.front.points.some((point) => point.control !== null);
  const shares = run.front.ceiling && run.front.ceiling.shares;
  const retention = run.front.points.some((point) => isMeasured(point.retention));
  const rewards = [...new Set(run.front.points.flatMap((point) => Object.keys(point.rewards || {})))];
  const head = ["point", "reward", ...rewards.map((name) => `reward ${name}`), "KL, nats", shares && "of ceiling", control && "control", "distinct-2", "tokens", "ended by itself", retention && "retention"].filter(Boolean);
  const row = (point) => {
    const on = point.name === state.point;
    const button = h("button", { type: "button", "aria-pressed": String(on), "data-point": point.name }, pointLabel(point));
    const tag = run.front.chosen === point.name && h("span", { class: "tag", title: "the folder adapter/ holds this one" }, "adapter/");
    const own = rewards.map((name) => format((point.rewards || {})[name] ?? null));
    const cells = [interval(point.reward, point.reward_ci), ...own, interval(point.kl, point.kl_ci), shares ? shares[point.name] : false, control && interval(point.control, point.control_ci)];
    cells.push(format(point.distinct_2), format(point.length, 1), percent(point.eos_rate), retention && interval(point.retention, point.retention_ci));
    const mark = point.extrapolated && h("span", { class: "tag", title: "beyond SLERP, η = 1" }, "extrapolated");
    const line = h("tr", { class: on ? "on" : "", click: () => select(point.name) }, h("td", {}, button, tag, mark));
    line.append(...cells.filter((cell) => cell !== false).map((cell) => h("td", { class: "number" }, cell)));
    return line;
  };
  const heads = head.map((name, n) => h("th", { scope: "col", class: n ? "number" : "" }, name));
  return h("table", { class: "points" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, run.front.points.map(row)));
}

function pointPanel(run, state) {
  const point = run.front && byName(run.front.points, state.point);
  if (!point) return [h("h3", {}, "Texts"), h("p", { class: "empty" }, "The front has not been measured yet; texts of the training are below.")];
  const facts = [["reward", interval(point.reward, point.reward_ci)], ["KL", `${interval(point.kl, point.kl_ci)} nats`]];
  if (point.control !== null) facts.push(["control", interval(point.control, point.control_ci)]);
  if (isMeasured(point.retention)) facts.push(["retention", interval(point.retention, point.retention_ci)]);
  if (point.extrapolated) facts.push(["η above 1:", "extrapolated"]);
  const parts = [h("h3", {}, `Texts of ${pointLabel(point)}`), h("p", { class: "facts" }, facts.map(([name, value]) => h("span", {}, `${name} `, h("b", {}, value))))];
  const rows = run.texts ? run.texts.rows.filter((row) => point.name in row.texts) : [];
  if (!rows.length) return [...parts, h("p", { class: "empty" }, "No texts were kept.")];
  const list = h("div", { class: "list", tabindex: "0", role: "region", "aria-label": `Texts of ${pointLabel(point)}` });
  const more = (count) => {
    list.replaceChildren(...rows.slice(0, count).map((row) => sample(row, point.name)));
    if (count < rows.length) list.append(h("div", { class: "more" }, h("button", { type: "button", click: () => more(count + 20) }, `${rows.length - count} more`)));
  };
  more(SHOWN_SAMPLES);
  return [...parts, list];
}

function sample(row, name) {
  const sft = row.texts.sft;
  const parts = [score(row, name), textElement(row.prompt, { kind: "prompt" }), textElement(row.texts[name], { kind: "after" })];
  if (name !== "sft" && sft !== undefined) parts.push(h("div", { class: "before" }, "SFT: ", textElement(sft)));
  return h("div", { class: "sample" }, parts);
}

function score(row, name) {
  const value = row.rewards ? row.rewards[name] : null;
  if (value === null || value === undefined) return null;
  const gain = name !== "sft" && row.rewards.sft !== undefined ? value - row.rewards.sft : 0;
  return h("span", { class: `score ${gain > 0.005 ? "up" : gain < -0.005 ? "down" : ""}` }, `reward ${format(value)}`);
}

/** Reward against control score: the two should rise together. */
function controlSection(run, state, select) {
  const points = run.front ? run.front.points.filter((point) => point.control !== null) : [];
  if (!points.length) return null;
  const lead =
    "The control score was never seen in training. Along the line from SFT to SLERP both should rise; where reward goes on to the right and control does not go up, " +
    "the policy is gaming the reward model.";
  const line = points.filter((point) => point.eta !== null).sort((a, b) => a.eta - b.eta);
  const data = (some) =>
    some.map((p) => ({ value: [p.reward, p.control], point: p.name, symbol: pointStyle(p).symbol, symbolSize: pointStyle(p).size, itemStyle: { color: pointStyle(p).colour } }));
  const option = () => ({
    grid: { left: 58, right: 22, top: 20, bottom: 46 },
    xAxis: axis("reward", { nameGap: 28 }),
    yAxis: axis("control score", { nameGap: 40 }),
    tooltip: tooltip((item) => frontTip(item, points, run), { trigger: "item" }),
    series: [
      ...run.trajectories.filter((way) => way.held_out && way.points.some((point) => point[5] !== null)).map((way) => ({
        type: "line", data: way.points.map((point) => ({ value: [point[1], point[5]], way, at: point })), color: policyColour(way.policy), symbol: "circle", symbolSize: 3, z: 1,
        lineStyle: { width: 1.2, opacity: 0.35 }, itemStyle: { opacity: 0.35 },
      })),
      errorBars(points.map((p) => [p.reward, p.control, p.reward_ci, p.control_ci, pointStyle(p).colour])),
      { type: "line", data: data(line), color: colour("accent"), lineStyle: { width: 2 }, z: 3, label: { show: true, position: "top", fontSize: 11.5, color: colour("soft"), formatter: (item) => pointLabel(byName(points, item.data.point)) }, labelLayout: { hideOverlap: true } },
      { type: "scatter", data: data(points.filter((p) => p.eta === null)), z: 4 },
    ],
  });
  const warnings = run.findings.filter((one) => /control/i.test(one.title));
  const verdict = warnings.length ? warnings.map(notice) : notice({ level: "note", title: "No sign of over-optimisation", text: "Where the reward rises along the front, the control score does not fall by more than its error." });
  const chart = chartBox("Reward against control score of every point", option, { onClick: (event) => event.data && event.data.point && select(event.data.point) });
  return section("control", "Reward against control", lead, verdict, h("div", { class: "card" }, chart));
}

function notice(one) {
  return h("div", { class: `notice ${one.level}`, role: one.level === "warning" ? "alert" : null }, h("b", {}, one.title), h("p", {}, one.text));
}
