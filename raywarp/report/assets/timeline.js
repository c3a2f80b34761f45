"use strict";
// Who was busy when, what bound the run, and what went wrong.

const TROUBLE = new Set(["fault", "hang", "lost", "failed", "stopped", "moved"]);

function timelineSection(run) {
  const lead = "Share of each slice of time in which an actor had work, while policies were fine-tuned and the front was measured. Marks are faults and stops.";
  const line = run.timeline;
  const parts = [];
  if (line) {
    const names = Object.keys(line.lanes);
    const chart = chartBox("Busy shares of all actors over time", () => timelineOption(run, line, names), { height: 22 * names.length + 92 });
    const note = [`One slice is ${duration(line.seconds)}.`];
    if (line.pauses.length) note.push(`${line.pauses.length} pause${line.pauses.length > 1 ? "s" : ""} of ${duration(line.pauses.reduce((sum, one) => sum + one[1], 0))} in all, in which nothing ran, cut out (dotted).`);
    parts.push(h("div", { class: "card" }, chart, h("p", { class: "about" }, note.join(" "))));
  } else parts.push(h("p", { class: "empty" }, "When who was at work was not recorded (the run was made by an older raywarp), or no step has been finished yet."));
  if (run.timing.length) parts.push(h("div", { class: "scroll", style: { "margin-top": "16px" } }, timingTable(run.timing)));
  return section("time", "Where the time went", lead, ...parts);
}

function timelineOption(run, line, names) {
  const data = names.flatMap((name, y) => line.lanes[name].map((share, x) => [x, y, share]));
  const labels = line.starts.map((start) => clock(start));
  const marks = Object.entries(line.iterations).map(([iteration, slice]) => ({ xAxis: slice, label: { formatter: iteration === "evaluation" ? iteration : `iteration ${iteration}` } }));
  const cuts = line.pauses.map(([slice]) => ({ xAxis: slice, lineStyle: { type: "dotted" }, label: { show: false } }));
  const moments = line.moments.slice(-run.events.length);
  const troubles = run.events.map((event, n) => ({ event, slice: moments[n] })).filter((one) => TROUBLE.has(one.event.event) && one.slice !== null && one.slice !== undefined);
  const category = (list, more) => ({ type: "category", data: list, axisLine: { show: false }, axisTick: { show: false }, axisLabel: { color: colour("faint"), fontSize: 11 }, ...more });
  return {
    grid: { left: 112, right: 16, top: 26, bottom: 58 },
    xAxis: category(labels, { axisLabel: { color: colour("faint"), fontSize: 11, hideOverlap: true, interval: "auto" } }),
    yAxis: category(names, { inverse: true }),
    tooltip: tooltip((item) => timelineTip(item, line, names), { trigger: "item" }),
    visualMap: {
      min: 0, max: 1, dimension: 2, seriesIndex: 0, orient: "horizontal", left: "center", bottom: 0, itemWidth: 10, itemHeight: 120, calculable: false,
      text: ["busy", "idle"], textStyle: { color: colour("faint"), fontSize: 11 }, inRange: { color: [colour("busy0"), colour("busy1")] },
    },
    series: [
      {
        type: "heatmap", data, progressive: 0, itemStyle: { borderWidth: 0 },
        markLine: { silent: true, symbol: "none", data: [...marks, ...cuts], lineStyle: { color: colour("ink"), width: 1, type: "solid", opacity: 0.55 }, label: { color: colour("soft"), fontSize: 11, position: "start", distance: 4 } },
      },
      { type: "scatter", symbol: "triangle", symbolSize: 11, itemStyle: { color: colour("bad"), borderColor: colour("card"), borderWidth: 1 }, z: 5, data: troubles.map(({ event, slice }) => ({ value: [slice, Math.max(0, names.indexOf(event.what))], event })) },
    ],
  };
}

function timelineTip(item, line, names) {
  if (item.data.event) return eventLines(item.data.event);
  const [x, y, share] = item.data;
  return [names[y], `${clock(line.starts[x])} to ${clock(line.starts[x] + line.seconds)}`, `${percent(share)} busy`];
}

function eventLines(event) {
  const who = event.policy ? `iteration ${event.iteration}, policy ${event.policy}` : "";
  return [`${event.event}: ${event.what || "run"}`, who, event.cause || "", String(event.message || "").slice(0, 120)].filter(Boolean).map(visible);
}

function timingTable(rows) {
  const heads = ["iteration", "steps", "time", "steps/s", "trainers busy", "rollout workers busy", "reward busy", "restarts"];
  const cells = (row) => [row.iteration, row.steps, duration(row.seconds), format(row.steps_per_second), percent(row.trainer_busy), percent(row.pool_busy), percent(row.reward_busy), row.restarts];
  const line = (row) => h("tr", {}, cells(row).map((cell, n) => h("td", { class: n ? "number" : "" }, String(cell ?? "–"))), h("td", {}, row.bound || ""));
  return h("table", {}, h("thead", {}, h("tr", {}, heads.map((name, n) => h("th", { scope: "col", class: n ? "number" : "" }, name)), h("th", { scope: "col" }, "what bound it"))), h("tbody", {}, rows.map(line)));
}

/** events.jsonl, whatever it tells besides the run's start and end. */
function faultsSection(run) {
  const lead = "Everything that happened to the run: deaths and hangs of its processes, what was done again, stops and starts.";
  const faults = run.events.filter((event) => event.event === "fault");
  const count = faults.length ? `${faults.length} fault${faults.length > 1 ? "s" : ""} survived or met.` : "No fault.";
  if (!run.events.length) return section("faults", "Faults", lead, h("p", { class: "empty" }, "There is no events.jsonl."));
  const cells = (event) => [
    event.seconds ? clock(event.seconds, true) : String(event.time || ""), event.event, event.what || "", event.policy ? `${event.iteration} / ${event.policy}` : "",
    event.step ?? "", event.cause || "", event.seconds_lost ? duration(event.seconds_lost) : "",
  ];
  const line = (event) => h("tr", {}, cells(event).map((cell) => h("td", {}, visible(String(cell)))), h("td", { class: "mono" }, event.message ? textElement(String(event.message)) : ""));
  const heads = ["when", "what happened", "to", "iteration / policy", "step", "cause", "lost", "message"];
  const table = h("table", {}, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, run.events.map(line)));
  return section("faults", "Faults", lead, h("p", {}, count), h("details", { open: run.events.length < 25 }, h("summary", {}, `${run.events.length} events`), h("div", { class: "scroll" }, table)));
}
