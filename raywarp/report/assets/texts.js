"use strict";
// The same prompts, point by point: sortable, searchable, what changed most first; and what the policies wrote while they trained.

const PAGE_OF_ROWS = matchMedia("(max-width: 680px)").matches ? 6 : 12;

function textsSection(run, state) {
  const lead = "What each model wrote for the same held-out prompts, with its reward. Pale is what a text shares with SFT's from its beginning.";
  const texts = run.texts;
  if (!texts || !texts.rows.length) return section("texts", "Texts side by side", lead, h("p", { class: "empty" }, "There are no texts yet: they come with the front."));
  const view = state.texts || (state.texts = { query: "", sort: "changed", descending: true, columns: defaultColumns(texts, run) });
  const body = h("div", { class: "scroll" });
  const more = h("div", { class: "more", role: "status" });
  let shown = PAGE_OF_ROWS;
  const draw = () => {
    const rows = sortedRows(texts, view);
    body.replaceChildren(textTable(run, rows.slice(0, shown), view, (sort) => {
      view.descending = view.sort === sort ? !view.descending : sort !== "prompt";
      view.sort = sort;
      sorts.value = sort;
      draw();
    }));
    const clipped = texts.total > texts.rows.length ? ` (of ${texts.total} in samples.json, those that changed most, to keep this page small)` : "";
    const count = `${Math.min(shown, rows.length)} of ${rows.length} ${rows.length < texts.rows.length ? "matching prompts" : "prompts"}${clipped}`;
    more.replaceChildren(h("span", { id: "texts-count" }, count));
    if (shown < rows.length) {
      more.prepend(h("button", { type: "button", click: () => ((shown += 50), draw()) }, "Show more"));
    }
  };
  const search = h("input", { type: "search", id: "texts-search", placeholder: "Search prompts and texts", "aria-label": "Search prompts and texts", value: view.query });
  search.addEventListener("input", () => {
    view.query = search.value.trim().toLowerCase();
    shown = PAGE_OF_ROWS;
    draw();
  });
  const options = [["changed", "most changed first"], ["place", "order of the prompts"], ["prompt", "prompt"], ...view.columns.map((name) => [`reward:${name}`, `reward of ${nameOf(run, name)}`])];
  const sorts = h("select", { id: "texts-sort" }, options.map(([value, text]) => h("option", { value, selected: value === view.sort }, text)));
  sorts.addEventListener("change", () => {
    view.sort = sorts.value;
    view.descending = !["place", "prompt"].includes(view.sort);
    draw();
  });
  const chips = texts.points.map((name) => {
    const chip = h("button", { type: "button", class: "chip", "aria-pressed": String(view.columns.includes(name)) }, nameOf(run, name));
    chip.addEventListener("click", () => {
      const on = !view.columns.includes(name);
      view.columns = texts.points.filter((one) => (one === name ? on : view.columns.includes(one)));
      chip.setAttribute("aria-pressed", String(on));
      draw();
    });
    return chip;
  });
  draw();
  const bar = h("div", { class: "bar" }, search, h("label", {}, "Sort by", sorts));
  return section("texts", "Texts side by side", lead, bar, h("div", { class: "bar", role: "group", "aria-label": "Columns" }, "Columns", chips), body, more);
}

function nameOf(run, name) {
  const point = run.front && byName(run.front.points, name);
  const label = point ? pointLabel(point) : name;
  return run.front && run.front.chosen === name ? `${label} (chosen)` : label;
}

/** SFT, the policies, SLERP and the chosen η; of many policies the first few. */
function defaultColumns(texts, run) {
  const policies = texts.points.filter((name) => name.startsWith("policy "));
  const wanted = new Set(["sft", "slerp", run.front && run.front.chosen, ...policies.slice(0, policies.length > 5 ? 2 : 5)]);
  return texts.points.filter((name) => wanted.has(name));
}

function sortedRows(texts, view) {
  const found = view.query ? texts.rows.filter((row) => [row.prompt, ...Object.values(row.texts)].some((text) => text.toLowerCase().includes(view.query))) : [...texts.rows];
  const reward = view.sort.startsWith("reward:") ? view.sort.slice(7) : null;
  const key = (row) => (reward === null ? row[view.sort] : row.rewards ? row.rewards[reward] ?? -Infinity : -Infinity);
  const order = view.descending ? -1 : 1;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  return found.sort((a, b) => order * compare(key(a), key(b)) || a.place - b.place);
}

function textTable(run, rows, view, sortBy) {
  const heading = (sort, label) => {
    const sorted = view.sort === sort;
    const arrow = sorted ? (view.descending ? " ↓" : " ↑") : "";
    const direction = sorted ? (view.descending ? "descending" : "ascending") : null;
    return h("th", { scope: "col", "aria-sort": direction }, h("button", { type: "button", "data-sort": sort, click: () => sortBy(sort) }, label + arrow));
  };
  const head = h("tr", {}, heading("prompt", "prompt"), view.columns.map((name) => heading(`reward:${name}`, nameOf(run, name))));
  const cell = (row, name) => {
    const text = row.texts[name];
    if (text === undefined) return h("td", { "data-label": nameOf(run, name) }, h("span", { class: "empty" }, "–"));
    const before = name === "sft" ? null : row.texts.sft;
    return h("td", { "data-label": nameOf(run, name) }, h("span", { class: "values" }, values(row, name)), textElement(text, { before: before === undefined ? null : before, query: view.query }));
  };
  const line = (row) => h("tr", {}, h("th", { scope: "row" }, textElement(row.prompt, { query: view.query })), view.columns.map((name) => cell(row, name)));
  const empty = h("tr", {}, h("td", { colspan: String(view.columns.length + 1) }, h("span", { class: "empty" }, "No prompt or text matches.")));
  return h("table", { class: "texts", style: { "--columns": String(view.columns.length + 1) } }, h("thead", {}, head), h("tbody", {}, rows.length ? rows.map(line) : empty));
}

function values(row, name) {
  const kinds = [["rewards", "reward"], ["control", "control"], ...(name === "sft" ? [] : [["kl", "KL"]])];
  const known = kinds.filter(([key]) => row[key] && row[key][name] !== undefined);
  return known.map(([key, label]) => h("span", {}, `${label} ${format(row[key][name])}`));
}

/** A text per step of each policy: reward hacking is seen here before it is seen in numbers. */
function trainingTextsSection(run, state) {
  if (!run.training_texts.length) return null;
  const lead = "One completion per step, of the step's first prompt, as the policy changed.";
  const strips = run.training_texts;
  const name = (one) => `iteration ${one.iteration}, policy ${one.policy}`;
  const select = h("select", { "aria-label": "Policy" }, strips.map((one, n) => h("option", { value: String(n) }, name(one))));
  const body = h("div", { class: "card" });
  const draw = () => {
    const one = strips[Number(select.value)];
    const note = one.total > one.rows.length ? h("p", { class: "about" }, `${one.rows.length} of ${one.total} steps, evenly chosen`) : null;
    const lines = one.rows.map((row) => [
      h("div", {}, `step ${row.step + 1}`, h("br"), h("span", { class: "about" }, row.reward === null ? "" : `reward ${format(row.reward)}`)),
      h("div", {}, textElement(row.prompt, { kind: "prompt" }), textElement(row.completion)),
    ]);
    body.replaceChildren(...[note, h("div", { class: "filmstrip" }, lines)].filter(Boolean));
  };
  select.value = String(Math.min(state.strip ?? strips.length - 1, strips.length - 1));
  select.addEventListener("change", () => ((state.strip = Number(select.value)), draw()));
  draw();
  return section("training", "Texts while training", lead, h("div", { class: "bar" }, h("label", {}, "Policy", select)), h("details", { open: strips.length < 3 }, h("summary", {}, "Show the texts"), body));
}
