"use strict";
// A completion with its tokens coloured by what PPO knows of them, each readable by pointer, touch and keyboard.

const COLOURINGS = {
  none: { label: "None" },
  change: { label: "Log-prob change", unit: "nats", of: (tokens, place) => tokens.log_probs[place] - tokens.ref_log_probs[place] },
  advantage: { label: "Advantage", unit: "whitened", of: (tokens, place) => tokens.advantages[place] },
  value: { label: "Value", unit: "reward units", of: (tokens, place) => tokens.values?.[place] },
};

/** A sample's per_token if it is whole: as many numbers as pieces, and pieces that make up the completion. */
function tokensOf(sample) {
  const tokens = sample.per_token;
  if (!tokens || !Array.isArray(tokens.pieces) || tokens.pieces.join("") !== sample.completion) return null;
  const names = ["log_probs", "ref_log_probs", "advantages", ...("values" in tokens ? ["values"] : [])]; // of a critic
  const arrays = names.map((name) => tokens[name]);
  return arrays.every((array) => Array.isArray(array) && array.length === tokens.pieces.length) ? tokens : null;
}

/** The size of a colouring's values that gets the full colour: that of 95% of the tokens shown. */
function colourScale(samples, colouring) {
  const { of } = COLOURINGS[colouring];
  const sizes = samples.flatMap((sample) => {
    const tokens = of && tokensOf(sample);
    return tokens ? tokens.pieces.map((_, place) => Math.abs(of(tokens, place))).filter(Number.isFinite) : [];
  });
  sizes.sort((one, other) => one - other);
  return sizes.length ? sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes.at(-1) || 1 : 0;
}

function completionNode(sample, colouring, scale) {
  const tokens = colouring === "none" ? null : tokensOf(sample);
  const attributes = { class: "completion", dir: "auto" };
  if (!tokens) return el("p", attributes, sample.completion ? visible(sample.completion) : el("i", {}, "(empty)"), endMark(sample));
  const { of } = COLOURINGS[colouring];
  const spans = tokens.pieces.map((piece, place) => {
    const part = of(tokens, place) / scale;
    const strength = Math.min(1, Math.abs(part) || 0);
    const last = piece === "" && place === tokens.pieces.length - 1 && sample.ended;
    return el("span", {
      class: piece === "" ? "token mark" : "token", "data-place": place,
      style: { "background-color": `rgb(var(--${part < 0 ? "minus" : "plus"}) / calc(var(--token-ink) * ${strength.toFixed(3)}))` },
    }, piece === "" ? (last ? "end" : "·") : visible(piece));
  });
  const node = el("p", { ...attributes, class: "completion tokens", tabindex: 0, role: "group", "aria-label": `${sample.completion}. Arrow keys read the tokens.` }, spans, endMark(sample));
  node.addEventListener("pointerover", (event) => showToken(event.target.closest(".token"), tokens));
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("blur", hideTip);
  node.addEventListener("keydown", (event) => {
    const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (!direction) return;
    const here = spans.findIndex((span) => span.classList.contains("read"));
    showToken(spans[Math.min(spans.length - 1, Math.max(0, here + direction))], tokens);
    event.preventDefault();
  });
  return node;
}

function endMark(sample) {
  if (sample.ended !== false) return null;
  return el("span", { class: "cut", title: "It reached the longest length allowed before it ended by itself." }, "cut off");
}

function showToken(span, tokens) {
  if (!span) return;
  hideTip();
  span.classList.add("read");
  const place = Number(span.dataset.place);
  const rows = [
    ["log-prob", number(tokens.log_probs[place]), "nats"],
    ["reference", number(tokens.ref_log_probs[place]), "nats"],
    ["change", signed(Number((tokens.log_probs[place] - tokens.ref_log_probs[place]).toFixed(4))), "nats"],
    ...(tokens.values ? [["value", number(tokens.values[place]), "reward units"]] : []),
    ["advantage", signed(tokens.advantages[place]), ""],
  ];
  const tip = byId("tip");
  tip.replaceChildren(el("b", {}, tokens.pieces[place] === "" ? "(no text of its own)" : `token ${place + 1}`),
    el("table", {}, rows.map(([name, value, unit]) => el("tr", {}, el("th", {}, name), el("td", {}, value), el("td", { class: "unit" }, unit)))));
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), window.innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${above > 8 ? above : box.bottom + 6}px`);
}

function hideTip() {
  byId("tip").hidden = true;
  document.querySelectorAll(".token.read").forEach((span) => span.classList.remove("read"));
}

function sampleFacts(sample) {
  const facts = [["step", sample.step], ["score", number(sample.score)], ["KL", `${number(Math.abs(sample.kl) < 1e-4 ? 0 : sample.kl)} nats`]];
  if (typeof sample.tokens === "number") facts.push(["", plural(sample.tokens, "token")]);
  for (const [name, value] of Object.entries(sample)) {
    if (/^(gold|reward)\//.test(name) && typeof value === "number") facts.push([name, number(value)]);
  }
  return el("p", { class: "facts" }, facts.map(([name, value]) => el("span", {}, name ? `${name} ` : "", el("b", {}, String(value)))));
}

const promptNode = (prompt) => el("p", { class: "prompt", dir: "auto" }, prompt ? visible(prompt) : el("i", {}, "(empty prompt)"));

function pairCard([before, after], colouring, scale) {
  const gain = after.score - before.score;
  return el("article", { class: "sample" }, promptNode(before.prompt),
    el("div", { class: "pair" }, [[before, "Before"], [after, "After"]].map(([sample, word]) =>
      el("div", {}, el("h4", {}, word), completionNode(sample, colouring, scale), sampleFacts(sample)))),
    Number.isFinite(gain) ? el("p", { class: "facts" }, el("span", {}, "score, after minus before ", el("b", {}, signed(Number(gain.toFixed(4)))))) : null);
}
