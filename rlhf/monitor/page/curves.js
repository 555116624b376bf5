"use strict";
// The curves of all runs, kept up to date: whole ones at the resolution of a screen, and the part that is zoomed into.

const MOST_POINTS = 3000;

class Curves {
  #source;
  #held = new Map(); // "run stage" -> {generation, last, curves: Map name -> curve}
  #window = null; // {held: Map "run stage" -> Map name -> curve}

  constructor(source) {
    this.#source = source;
  }

  /** Fetch what a stage has got since the last call; whether there was anything. */
  async update(run, stage, generation) {
    const key = `${run} ${stage.name}`;
    let held = this.#held.get(key);
    if (held?.generation !== generation) held = null;
    if (held && held.last >= stage.step) return false;
    if (held && [...held.curves.values()].some((curve) => curve.x.length > MOST_POINTS)) held = null;
    const answer = await this.#source.curves(run, stage.name, held ? held.last + 1 : 0);
    if (!held || answer.generation !== generation) {
      held = { generation: answer.generation, last: -1, curves: new Map() };
      this.#held.set(key, held);
    }
    for (const [name, part] of Object.entries(answer.curves)) append(held.curves, name, part);
    for (const curve of held.curves.values()) held.last = Math.max(held.last, curve.end);
    return true;
  }

  /** A metric of a run as {x, mean, low, high, weight}, from the zoomed part where there is one. */
  get(run, stage, name) {
    const key = `${run} ${stage}`;
    return this.#window?.held.get(key)?.get(name) ?? this.#held.get(key)?.curves.get(name);
  }

  /** Fetch steps first..last of some runs at full resolution; null goes back to the whole. */
  async zoom(runs, stage, range) {
    this.#window = null;
    if (!range || !this.#source.live) return;
    const margin = (range[1] - range[0]) / 4; // so that smoothing has not just begun at the edge
    const [first, last] = [Math.max(0, Math.floor(range[0] - margin)), Math.ceil(range[1] + margin)];
    const held = new Map();
    for (const run of runs) {
      const whole = this.#held.get(`${run} ${stage}`);
      if (!whole || ![...whole.curves.values()].some((curve) => curve.low.length)) continue;
      const answer = await this.#source.curves(run, stage, first, last);
      const curves = new Map();
      for (const [name, part] of Object.entries(answer.curves)) append(curves, name, part);
      held.set(`${run} ${stage}`, curves);
    }
    this.#window = { held };
  }
}

function append(curves, name, part) {
  if (!curves.has(name)) curves.set(name, { x: [], mean: [], low: [], high: [], weight: [], end: -1 });
  const curve = curves.get(name);
  if (!part.steps.length) return;
  const weight = part.weight ?? 1;
  if (weight > 1 && !curve.low.length) {
    curve.low = curve.mean.slice();
    curve.high = curve.mean.slice();
  }
  if (curve.low.length || weight > 1) {
    curve.low.push(...(part.low ?? part.mean));
    curve.high.push(...(part.high ?? part.mean));
  }
  curve.x.push(...part.steps);
  curve.mean.push(...part.mean);
  for (const _ of part.steps) curve.weight.push(weight);
  curve.end = part.last;
}

/** Exponential moving average without the bias to its start, as in TensorBoard; a merged point counts for all it holds. */
function smoothed(curve, strength) {
  let sum = 0;
  let total = 0;
  return curve.mean.map((value, place) => {
    if (value == null) return null;
    const keep = strength ** curve.weight[place];
    sum = keep * sum + (1 - keep) * value;
    total = keep * total + (1 - keep);
    return sum / total;
  });
}
