"use strict";
// Elements and texts. Every text comes into the page through textContent: whatever a completion holds, it is shown and never run.

/** An element with attributes (functions are listeners) and children (strings become text). */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** A text as it can be seen: control characters as their pictures, marks that turn the direction of writing by their numbers. */
function visible(text) {
  return String(text).replace(CONTROL, (character) => {
    const code = character.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

/** A model's or dataset's text: its own direction of writing, what it shares with `before` pale, `query` marked. */
function textElement(text, { before = null, query = "", kind = "" } = {}) {
  const element = h("span", { class: `text ${kind}`, dir: "auto" });
  const shared = before === null ? 0 : sharedStart(before, text);
  if (shared > 0 && shared < text.length) element.append(h("span", { class: "same" }, marked(text.slice(0, shared), query)));
  element.append(...marked(text.slice(shared < text.length ? shared : 0), query));
  if (text === "") element.append(h("span", { class: "same" }, "(empty)"));
  return element;
}

/** Characters at the beginning of both, in whole words. */
function sharedStart(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n += 1;
  if (n === a.length && n === b.length) return n;
  while (n > 0 && !/\s/.test(b[n - 1])) n -= 1;
  return n;
}

function marked(text, query) {
  if (!query) return [visible(text)];
  const parts = [];
  const lower = text.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(query); at >= 0 && lower.length === text.length; at = lower.indexOf(query, from)) {
    parts.push(visible(text.slice(from, at)), h("mark", {}, visible(text.slice(at, at + query.length))));
    from = at + query.length;
  }
  return [...parts, visible(text.slice(from))];
}

/** A number for people: 3 significant digits or so, a true minus. */
function format(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en-US") : size !== 0 && size < 10 ** -digits ? value.toPrecision(2) : value.toFixed(digits);
  return text.replace("-", "−");
}

function interval(value, half) {
  return half === null || half === undefined ? format(value) : `${format(value)} ± ${format(half)}`;
}

function percent(share) {
  return share === null || share === undefined ? "–" : `${Math.round(share * 100)} %`;
}

function duration(seconds) {
  if (seconds < 90) return `${format(seconds, seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${format(seconds / 3600, 1)} h`;
}

function clock(seconds, withDate = false) {
  const time = new Date(seconds * 1000);
  const options = { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false };
  return withDate ? time.toLocaleString("en-GB", { year: "numeric", month: "short", day: "numeric", ...options }) : time.toLocaleTimeString("en-GB", options);
}

/** A section of the page with its heading, a sentence on how to read it, and what it holds. */
function section(id, title, lead, ...content) {
  return h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), lead && h("p", { class: "lead" }, lead), ...content);
}
