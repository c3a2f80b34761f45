"use strict";
// The page: reads the data that it carries, draws the sections of one run, and, where it is served, follows the run.

const EVERY = 3000; // milliseconds between two looks at a run that goes on
const THEMES = ["auto", "light", "dark"];
const system = matchMedia("(prefers-color-scheme: dark)");
const state = { run: 0, theme: "auto" };
let page = null;

/** The data that the page carries, as it is or compressed. */
async function carried() {
  const { type, textContent } = document.getElementById("data");
  if (type === "application/json") return JSON.parse(textContent);
  const bytes = Uint8Array.from(atob(textContent), (character) => character.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
}

/** Texts and values by the names of their points: they travel as lists in the order of the points. */
function unpacked(data) {
  for (const { texts } of data.runs.filter((run) => run.texts)) {
    const named = (list) => Object.fromEntries(texts.points.map((name, n) => [name, list[n]]).filter(([, one]) => one !== null));
    for (const row of texts.rows) for (const kind of ["texts", "rewards", "kl", "control"]) if (row[kind]) row[kind] = named(row[kind]);
  }
  return data;
}

function applyTheme(theme = state.theme) {
  const dark = theme === "dark" || (theme === "auto" && system.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const button = document.getElementById("theme");
  button.textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[state.theme];
  button.setAttribute("aria-label", `Colours: ${state.theme}; press to change`);
}

function summarySection(run) {
  const points = run.front ? run.front.points : [];
  const [sft, chosen] = [byName(points, "sft"), byName(points, run.front && run.front.chosen)];
  const planned = run.planned || {};
  const [least, most] = [Math.min, Math.max].map((bound) => bound(...(planned.policy_steps || [])));
  const all = planned.iterations ? planned.iterations * planned.policy_steps.reduce((sum, own) => sum + own, 0) : 0;
  const tiles = [];
  if (planned.iterations) tiles.push([`${planned.iterations} × ${planned.policies} × ${least === most ? most : `${least}–${most}`}`, "iterations × policies × steps"]);
  if (chosen) tiles.push([pointLabel(chosen), "chosen, in adapter/"]);
  if (chosen && sft) tiles.push([`${format(sft.reward)} → ${format(chosen.reward)}`, "reward, SFT → chosen"]);
  if (chosen) tiles.push([`${format(chosen.kl)} nats`, "KL of the chosen point to SFT"]);
  if (chosen && chosen.control !== null && sft) tiles.push([`${format(sft.control)} → ${format(chosen.control)}`, "control score, never trained on"]);
  if (!run.front && run.curves) tiles.push([`${run.curves.steps.toLocaleString("en-US")}${all ? ` of ${all.toLocaleString("en-US")}` : ""}`, "steps of all policies done"]);
  const seconds = run.timing.reduce((sum, row) => sum + (row.seconds || 0), 0);
  if (seconds) tiles.push([duration(seconds), "fine-tuning"]);
  const faults = run.events.filter((event) => event.event === "fault").length;
  if (run.events.length) tiles.push([String(faults), faults === 1 ? "fault" : "faults"]);
  const words = { finished: "finished", running: "under way", silent: "no sign of life", stopped: "stopped", failed: "failed", unknown: "unknown" };
  const about = [planned.model, planned.reward && `reward ${planned.reward}`, run.state.since && `started ${clock(run.state.since, true)}`].filter(Boolean).join("  ·  ");
  const heading = h("div", { class: "title" }, h("h1", {}, visible(run.name)), h("span", { class: `pill ${run.state.word}`, id: "state" }, words[run.state.word] || run.state.word), run.mark && h("span", { class: "pill silent", id: "mark" }, run.mark));
  const parts = [heading, h("p", { class: "sub" }, visible(about)), h("div", { class: "tiles" }, tiles.map(([value, name]) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, name))))];
  if (run.state.message) parts.push(notice({ level: "warning", title: `The run ${run.state.word}`, text: visible(run.state.message) }));
  if (run.state.word === "silent") parts.push(notice({ level: "warning", title: "The run started and has not said how it ended", text: `Its last sign of life is of ${clock(run.state.last_sign, true)}. If no process works on it any more, the same command continues it.` }));
  parts.push(...run.findings.map(notice));
  if (run.missing.length) parts.push(h("div", { class: "notice", id: "missing" }, h("b", {}, "What is missing"), h("ul", {}, run.missing.map((text) => h("li", {}, visible(text))))));
  return h("section", { id: "summary", "aria-label": "Summary" }, parts);
}

function runChooser() {
  if (page.runs.length < 2) return null;
  const select = h("select", { id: "run", "aria-label": "Run" }, page.runs.map((run, n) => h("option", { value: String(n), selected: n === state.run }, `${run.name} (${run.place})${run.mark ? `, ${run.mark.toLowerCase()}` : ""}`)));
  select.addEventListener("change", () => {
    Object.assign(state, { run: Number(select.value), point: null, axes: null, texts: null, curves: null, strip: null });
    draw();
  });
  return h("div", { class: "bar" }, h("label", { class: "wide" }, `${page.runs.length} runs; shown in full:`, select));
}

function settingsSection(run) {
  const lead = "The resolved configuration; bold is what differs from the default. Versions are those of the last start.";
  const versions = run.versions ? Object.entries(run.versions).map(([name, version]) => `${name} ${version}`).join(", ") : "The run does not say which versions it used.";
  const rows = (run.config || []).map((row) => h("tr", { class: row.changed ? "changed" : "" }, h("td", { class: "mono" }, row.key), h("td", { class: "mono" }, visible(row.value))));
  const table = run.config ? h("div", { class: "scroll" }, h("table", { class: "config" }, h("tbody", {}, rows))) : h("p", { class: "empty" }, "There is no config.yaml.");
  return section("settings", "Configuration and versions", lead, h("p", { class: "mono", id: "versions" }, visible(versions)), h("details", {}, h("summary", {}, `${rows.length} keys, ${rows.filter((row) => row.className).length} of them changed`), table));
}

function draw() {
  const run = page.runs[state.run];
  const names = run.front ? run.front.points.map((point) => point.name) : [];
  if (!names.includes(state.point)) state.point = run.front ? run.front.chosen : null;
  closeCharts();
  const select = (name) => {
    state.point = name;
    [front, preferences].filter(Boolean).forEach((one) => one.select());
  };
  const front = frontSection(run, page.runs, state, select);
  const preferences = preferencesSection(run, state, select);
  const sections = [summarySection(run), front, preferences, textsSection(run, state), controlSection(run, state, select), curvesSection(run, state), trainingTextsSection(run, state), geometrySection(run), timelineSection(run), faultsSection(run), settingsSection(run)];
  const main = document.getElementById("main");
  const height = main.offsetHeight;
  main.style.minHeight = `${height}px`;
  main.replaceChildren(...[runChooser(), ...sections].filter(Boolean));
  main.style.minHeight = "";
  const titles = { summary: "Summary", front: "Front", preferences: "Preferences", texts: "Texts", control: "Control", curves: "Curves", training: "Training texts", geometry: "Geometry", time: "Time", faults: "Faults", settings: "Settings" };
  document.getElementById("nav").replaceChildren(...sections.filter(Boolean).map((one) => h("a", { href: `#${one.id}` }, titles[one.id])));
  const made = `Made by raywarp ${page.version} on ${clock(page.made, true)}.`;
  document.getElementById("footer").replaceChildren(h("p", {}, `${made} This file is complete in itself and asks nothing of the network${page.live ? "; served here, it follows the run" : ""}. Charts by Apache ECharts (Apache-2.0).`));
  document.title = page.title;
}

async function follow() {
  try {
    const answer = await fetch("data.json", { headers: { "If-None-Match": page.tag }, cache: "no-store" });
    if (answer.status === 200) {
      page = unpacked(await answer.json());
      if (!document.activeElement || !["INPUT", "SELECT"].includes(document.activeElement.tagName)) draw();
    }
  } catch {
    document.getElementById("state").textContent = "the server has ended";
  }
  setTimeout(follow, EVERY);
}

document.getElementById("theme").addEventListener("click", () => {
  state.theme = THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length];
  applyTheme();
  redrawCharts();
});
system.addEventListener("change", () => (applyTheme(), redrawCharts()));
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => (details.open = true));
  document.documentElement.classList.add("printing");
  applyTheme("light");
  drawForPrint();
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  applyTheme();
  redrawCharts();
});
applyTheme();
carried().then((data) => {
  page = unpacked(data);
  draw();
  resizer.observe(document.getElementById("main"));
  if (page.live) setTimeout(follow, EVERY);
});
