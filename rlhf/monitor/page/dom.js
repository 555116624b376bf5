"use strict";
// Building elements and writing numbers. Text always enters as text: nothing here parses HTML.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => child != null && child !== false));
  return node;
}

const byId = (id) => document.getElementById(id);

/** Builds a node's content anew only when what it shows has changed, so that focus and open details stay. */
function refresh(node, shown, build) {
  const key = JSON.stringify(shown);
  if (node.dataset.shown === key) return;
  node.dataset.shown = key;
  node.replaceChildren(...[build()].flat());
}

/** Four significant digits; plain where that is short, powers of ten where it is not. */
function number(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || (size > 0 && size < 1e-3)) text = value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  else if (size >= 1000) text = Math.round(value).toLocaleString("en");
  else text = String(Number(value.toPrecision(4)));
  return text.replace("-", "−").replace("e-", "e−");
}

const percent = (share) => (share == null ? "–" : `${number(Number((100 * share).toPrecision(3)))} %`);
/** A metric's value as its unit wants it: shares in per cent. */
const inUnit = (value, unit) => (unit.startsWith("share") ? percent(value) : number(value));
const unitName = (unit) => unit.replace(/^share ?/, "");
const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  if (seconds < 59.5) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

const clock = (seconds) =>
  seconds == null ? "–" : new Date(1000 * seconds).toLocaleString("sv-SE").replace("T", " ");

/** Characters that would act instead of being seen: control characters and marks of direction. */
const UNSEEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff])/;

/** Text as nodes, with what would not be seen named by its code point. */
function visible(text) {
  return String(text)
    .split(UNSEEN)
    .filter((part) => part !== "")
    .map((part) => (UNSEEN.test(part) ? el("span", { class: "unseen" }, codePoint(part)) : part));
}

/** The same, with command-line flags as code. */
const flagged = (text) =>
  String(text).split(/(--[a-z][\w.-]*\w)/).map((part, place) => (place % 2 ? el("code", { class: "flag" }, part) : visible(part)));

const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
