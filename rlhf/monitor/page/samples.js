"use strict";
// The sample browser: search, sort, page, compare, colour.

const ROWS = 20;

class Samples {
  #root; #app;
  #query = { run: 0, text: "", prompt: null, sort: "newest", ended: "", pairs: "", tokens: "", offset: 0, limit: ROWS };
  #colouring = "none";
  #asked = 0;
  #seen = -1;
  #answer = null;

  constructor(root, app) {
    this.#root = root;
    this.#app = app;
    const query = this.#query;
    this.runs = el("select", { id: "sample-run", onchange: (event) => this.ask({ run: Number(event.target.value) }) });
    this.runLabel = el("label", { hidden: true }, "Run ", this.runs);
    let pause = 0;
    this.search = el("input", { type: "search", id: "search", placeholder: "words in prompt or completion", "aria-label": "Search samples", oninput: (event) => {
      clearTimeout(pause);
      pause = setTimeout(() => this.ask({ text: event.target.value }), 200);
    } });
    const pick = (key, options, name) => el("label", {}, `${name} `, el("select", { id: `sample-${key}`, onchange: (event) => this.ask({ [key]: event.target.value }) },
      options.map(([value, text]) => el("option", { value, selected: query[key] === value }, text))));
    const colouring = el("select", { id: "colouring", onchange: (event) => {
      this.#colouring = event.target.value;
      const tokens = this.#colouring === "none" ? "" : "yes";
      if (tokens === query.tokens) this.#draw();
      else this.ask({ tokens });
    } }, Object.entries(COLOURINGS).map(([value, { label }]) => el("option", { value }, label)));
    this.tools = el("div", { class: "tools" }, this.runLabel, this.search,
      pick("pairs", [["", "Completions"], ["yes", "Before and after"]], "Show"),
      pick("sort", [["newest", "newest first"], ["oldest", "oldest first"], ["score_high", "highest score"], ["score_low", "lowest score"], ["kl_high", "highest KL"], ["kl_low", "lowest KL"]], "Sort by"),
      pick("ended", [["", "any"], ["yes", "by itself"], ["no", "cut off"]], "Ended"),
      el("label", {}, "Colour tokens by ", colouring));
    this.scale = el("div", {});
    this.notice = el("p", { class: "count", role: "status" });
    this.list = el("div", { class: "samples" });
    this.pager = el("div", { class: "pager" });
    root.append(this.tools, this.scale, this.notice, this.list, this.pager);
  }

  /** Called with every new state: asks for samples when the view is opened, tells of new ones when it is open. */
  show() {
    const runs = this.#app.runs;
    this.runLabel.hidden = runs.length < 2;
    refresh(this.runs, runs.map((run) => run.name), () => runs.map((run) => el("option", { value: run.number }, run.name)));
    if (this.#root.hidden) return;
    const total = runs[this.#query.run]?.samples ?? 0;
    if (this.#seen < 0 || (this.#seen === 0 && total)) this.ask({});
    else this.#count(total - this.#seen);
  }

  async ask(change) {
    if (!("offset" in change)) change.offset = 0;
    Object.assign(this.#query, change);
    const number = (this.#asked += 1);
    this.#seen = this.#app.runs[this.#query.run]?.samples ?? 0;
    try {
      const answer = await this.#app.source.samples({ ...this.#query });
      if (number === this.#asked) this.#answer = answer;
    } catch (error) {
      this.notice.textContent = `The samples cannot be loaded: ${error.message}`;
      return;
    }
    if (number === this.#asked) this.#draw();
  }

  #draw() {
    const { rows } = this.#answer;
    hideTip();
    const scale = colourScale(rows.flat(), this.#colouring);
    this.scale.replaceChildren(...this.#legend(scale));
    this.#count(0);
    this.list.replaceChildren(...(rows.length ? rows.map((row) => this.#card(row, scale)) : [el("p", { class: "empty" }, this.#emptyText())]));
    this.#page();
  }

  #card(row, scale) {
    if (row.length === 2) return pairCard(row, this.#colouring, scale);
    const [sample] = row;
    const over = el("button", { type: "button", class: "quiet", onclick: () => this.ask({ prompt: sample.prompt, sort: "oldest", pairs: "" }) }, "this prompt over time");
    return el("article", { class: "sample" }, promptNode(sample.prompt), completionNode(sample, this.#colouring, scale),
      el("div", { class: "below" }, sampleFacts(sample), this.#query.prompt == null ? over : null));
  }

  #legend(scale) {
    if (!scale) return [];
    const { label, unit } = COLOURINGS[this.#colouring];
    return [el("div", { class: "scale", role: "img", "aria-label": `${label} from minus ${number(scale)} to plus ${number(scale)} ${unit}` },
      el("span", {}, `${label}: ${signed(-scale)}`), el("span", { class: "ramp" }), el("span", {}, `${signed(scale)} ${unit}`))];
  }

  #count(fresh) {
    if (!this.#answer) return;
    const { total, kept } = this.#answer;
    const noun = this.#query.pairs ? "prompt" : "sample";
    const all = this.#app.runs[this.#query.run]?.samples ?? 0;
    const selection = kept != null && kept < all ? `; this report keeps ${kept.toLocaleString("en")} of the run's ${all.toLocaleString("en")} samples` : "";
    const which = this.#query.tokens ? " with token data (the first log.token_samples of each iteration)" : "";
    const shown = [`${plural(total, noun)}${which}${selection}`, this.#query.prompt];
    refresh(this.notice, [shown, fresh], () => [
      el("span", {}, shown[0]),
      this.#query.prompt == null ? "" : el("button", { type: "button", onclick: () => this.ask({ prompt: null, sort: "newest" }) }, "All prompts"),
      fresh > 0 ? el("button", { type: "button", onclick: () => this.ask({}) }, `Show ${fresh.toLocaleString("en")} new`) : ""]);
    const sort = byId("sample-sort");
    if (sort) sort.value = this.#query.sort;
    const pairs = byId("sample-pairs");
    if (pairs) pairs.value = this.#query.pairs;
  }

  #emptyText() {
    if (this.#query.text || this.#query.ended || this.#query.prompt != null) return "No sample matches.";
    if (this.#query.tokens) return "The log has no token data. Newer runs write it for the first log.token_samples of each iteration.";
    if (this.#query.pairs) return "No prompt has completions of several steps yet.";
    return "No samples yet. PPO writes some in every iteration (log.samples).";
  }

  #page() {
    const { offset } = this.#query;
    const { total, rows } = this.#answer;
    const turn = (to) => () => {
      this.ask({ offset: to });
      this.tools.scrollIntoView({ block: "nearest" });
    };
    this.pager.hidden = total <= ROWS;
    this.pager.replaceChildren(
      el("button", { type: "button", disabled: offset === 0, onclick: turn(Math.max(0, offset - ROWS)) }, "Previous"),
      el("span", {}, `${(offset + 1).toLocaleString("en")} to ${(offset + rows.length).toLocaleString("en")} of ${total.toLocaleString("en")}`),
      el("button", { type: "button", disabled: offset + ROWS >= total, onclick: turn(offset + ROWS) }, "Next"));
  }
}
