"use strict";
// Makes elements. Every text becomes a text node: nothing here, or in the other files, parses a string as HTML.

const SVG = "http://www.w3.org/2000/svg";

// Control characters, invisible characters and characters that turn the direction of text would hide or reorder what a
// model has written, so they are shown by their code points. Line breaks and tabs stay.
const HIDDEN = new RegExp([
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f]",
  "[\\ufeff\\ufff9-\\uffff]", "[\\ud800-\\udbff](?![\\udc00-\\udfff])", "(?<![\\ud800-\\udbff])[\\udc00-\\udfff]",
].join("|"), "g");

function visible(text) {
  const code = (one) => one.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
  return String(text).replace(HIDDEN, (one) => `\u27e8U+${code(one)}\u27e9`);
}

// An element. `attributes` are set by name, `on` holds listeners by event; children are nodes, texts, or lists of them.
function el(name, attributes = {}, ...children) {
  const isSvg = name.startsWith("svg:");
  const made = isSvg ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (key.startsWith("aria-")) made.setAttribute(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    made.append(child instanceof Node ? child : visible(child));
  }
  return made;
}

// A button that reads like text; `link` colours it.
function plainButton(text, act, more = {}) {
  return el("button", { type: "button", class: "plain link", on: { click: act }, ...more }, text);
}

// A table that scrolls inside its own frame. Cells are texts or nodes; the first column is the row's name.
function grid(heads, rows, title) {
  const cells = (row) => row.map((cell, at) => (at ? el("td", {}, cell) : el("th", { scope: "row" }, cell)));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
    el("table", {},
      el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, cells(row))))));
}

// A number with three significant digits, without noise: 0.874, 1.2e-5, 2,000.
function number(value) {
  if (value === null || value === undefined) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value), short = Number(value.toPrecision(3));
  if (size >= 1000) return size < 1e15 ? Math.round(value).toLocaleString("en-US") : short.toExponential();
  return size < 1e-3 ? short.toExponential() : String(short);
}

function seconds(value) {
  const whole = Math.round(value), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  const two = (part) => String(part).padStart(2, "0");
  return hours ? `${hours}h${two(minutes)}m` : minutes ? `${minutes}m${two(whole % 60)}s` : `${whole}s`;
}
