"use strict";
// Where the data comes from: the server that sent the page, or the page itself when it is a report.
// Both answer the same three questions: state(), curves(run, stage, first, last), samples(query).

class LiveSource {
  live = true;
  #version = 0;

  /** {now, runs, table}; runs and table are undefined when nothing has changed. */
  async state() {
    const answer = await this.#get("state", { version: this.#version });
    this.#version = answer.version;
    return answer;
  }

  curves(run, stage, first, last) {
    return this.#get("curves", { run, stage, first, last });
  }

  samples(query) {
    return this.#get("samples", query);
  }

  async #get(what, parameters) {
    const given = Object.entries(parameters).filter(([, value]) => value != null && value !== "");
    const answer = await fetch(`api/${what}?${new URLSearchParams(given)}`, { signal: AbortSignal.timeout(20000) });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    return content;
  }
}

class ReportSource {
  live = false;
  #data;

  constructor(data) {
    this.#data = data;
  }

  async state() {
    const { now, runs, table } = this.#data;
    return { now, runs: runs.map((run) => run.state), table };
  }

  async curves(run, stage, first = 0) {
    const { state, curves } = this.#data.runs[run];
    return { generation: state.generation, curves: first === 0 ? (new Map(Object.entries(curves)).get(stage) ?? {}) : {} };
  }

  async samples(query) {
    const all = this.#data.runs[query.run].samples;
    const words = query.text.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = all.filter((sample) => {
      const text = `${sample.prompt}\n${sample.completion}`.toLowerCase();
      const ended = query.ended === "" || sample.ended === (query.ended === "yes");
      const tokens = !query.tokens || tokensOf(sample) != null;
      return ended && tokens && (query.prompt == null || sample.prompt === query.prompt) && words.every((word) => text.includes(word));
    });
    const rows = query.pairs ? pairsOf(matching) : matching.map((sample) => [sample]);
    rows.sort(ORDERS[query.sort]);
    return { total: rows.length, rows: rows.slice(query.offset, query.offset + query.limit), kept: all.length };
  }
}

/** First and last completion of every prompt that has some of several steps. */
function pairsOf(samples) {
  const pairs = new Map();
  for (const sample of samples) pairs.set(sample.prompt, [(pairs.get(sample.prompt) ?? [sample])[0], sample]);
  return [...pairs.values()].filter(([before, after]) => before.step < after.step);
}

const by = (key, sign) => (one, other) => rank(one, key, sign) - rank(other, key, sign) || 0;

function rank(row, key, sign) {
  const value = row.at(-1)[key];
  return typeof value === "number" ? sign * value : Infinity;
}

const ORDERS = {
  newest: by("step", -1),
  oldest: by("step", 1),
  score_high: by("score", -1),
  score_low: by("score", 1),
  kl_high: by("kl", -1),
  kl_low: by("kl", 1),
};
