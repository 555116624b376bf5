"use strict";
// Puts the page together: views, runs, theme, and the loop that asks for what is new.

const TABS = { overview: "Overview", charts: "Charts", samples: "Samples", setup: "Setup", events: "Log" };

class App {
  runs = [];
  #hidden = new Set();
  #stage = null;
  #tab = "overview";
  #now = 0;
  #chosen = null; // the theme, where it cannot be stored

  constructor(source) {
    this.source = source;
    this.curves = new Curves(source);
    this.overview = new Overview(byId("overview"), this.curves, this);
    this.charts = new Charts(byId("charts"), this.curves, this);
    this.samples = new Samples(byId("samples"), this);
    this.setup = new Setup(byId("setup"), this);
    byId("tabs").append(...Object.entries(TABS).map(([name, label]) => el("a", { href: `#${name}`, "data-tab": name }, label)));
    window.addEventListener("hashchange", () => this.#readHash());
    window.addEventListener("scroll", hideTip, { passive: true });
    this.#theme();
    this.#readHash();
    this.#follow();
  }

  visibleRuns() {
    return this.runs.filter((run) => !this.#hidden.has(run.number));
  }

  stageNames() {
    return [...new Set(this.visibleRuns().flatMap((run) => run.stages.map((stage) => stage.name)))];
  }

  /** The stage and runs that the charts show: the newest stage unless one was chosen. */
  view() {
    const names = this.stageNames();
    const stage = names.includes(this.#stage) ? this.#stage : names.at(-1);
    return { stage, runs: this.visibleRuns().filter((run) => run.stages.some((one) => one.name === stage)) };
  }

  setStage(name) {
    this.#stage = name;
    this.charts.zoomTo(null);
    this.#draw();
  }

  setTab(name) {
    window.location.hash = name;
  }

  /** Opens the charts at some steps of a stage. */
  showSteps(stage, first, last) {
    this.setStage(stage);
    const margin = Math.max(5, last - first);
    this.charts.zoomTo([Math.max(0, first - margin), last + margin]);
    this.setTab("charts");
  }

  emptyText() {
    if (!this.runs.length) return "Waiting for the first answer.";
    if (!this.visibleRuns().length) return "All runs are hidden; choose one above.";
    return "This run has not written anything yet. It appears here as soon as it does.";
  }

  #readHash() {
    const wanted = window.location.hash.slice(1);
    this.#tab = Object.hasOwn(TABS, wanted) ? wanted : "overview";
    for (const name of Object.keys(TABS)) byId(name).hidden = name !== this.#tab;
    for (const link of byId("tabs").children) {
      if (link.dataset.tab === this.#tab) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    hideTip();
    this.#draw();
  }

  async #follow() {
    let failures = 0;
    for (;;) {
      try {
        await this.#ask();
        failures = 0;
      } catch (error) {
        failures += 1;
        console.warn(String(error));
        this.#connection("lost", "connection lost, trying again");
      }
      if (!this.source.live) return;
      const busy = this.runs.some((run) => runStatus(run, this.#now)[1] === "busy");
      await new Promise((resolve) => setTimeout(resolve, failures ? Math.min(15000, 1000 * 2 ** failures) : busy ? 1500 : 4000));
    }
  }

  async #ask() {
    const answer = await this.source.state();
    this.#now = answer.now;
    if (answer.runs) {
      takeTable(answer.table);
      this.runs = answer.runs.map((run, number) => ({ ...run, number }));
      for (const run of this.runs) {
        for (const stage of run.stages) await this.curves.update(run.number, stage, run.generation);
      }
    }
    this.#connection(this.source.live ? "live" : "report", this.source.live ? "live" : `as of ${clock(answer.now)}`);
    if (answer.runs) this.#draw();
    else this.#drawStatus(); // time has passed
  }

  #connection(kind, text) {
    refresh(byId("connection"), [kind, text], () => [el("span", { class: `dot ${kind}` }), text]);
  }

  #draw() {
    document.title = `${this.runs.map((run) => run.name).join(", ") || "rlhf"}: ${TABS[this.#tab].toLowerCase()}`;
    this.#drawStatus();
    if (!this.runs.length) return;
    if (this.#tab === "charts") this.charts.show();
    if (this.#tab === "setup") this.setup.show();
    if (this.#tab === "events") this.#drawEvents();
    this.samples.show();
  }

  #drawStatus() {
    this.#drawRuns();
    if (this.#tab === "overview" && this.runs.length) this.overview.draw(this.#now);
  }

  #drawRuns() {
    const states = this.runs.map((run) => [run.name, ...runStatus(run, this.#now), this.#hidden.has(run.number), run.folder]);
    refresh(byId("runs"), states, () => states.map(([name, word, kind, hidden, folder], number) => {
      const inside = [swatch(number), el("b", {}, name), el("span", { class: `status ${kind}` }, word)];
      if (states.length === 1) return el("span", { class: "chip", title: folder }, inside);
      return el("button", { type: "button", class: "chip", title: folder, "aria-pressed": String(!hidden), onclick: () => this.#toggle(number) }, inside);
    }));
  }

  #toggle(number) {
    if (!this.#hidden.delete(number)) this.#hidden.add(number);
    this.#draw();
  }

  #drawEvents() {
    const runs = this.visibleRuns();
    refresh(byId("events"), runs.map((run) => [run.name, run.events, run.problems]), () => runs.map((run) => el("section", {},
      el("h2", {}, runs.length > 1 ? [swatch(run.number), run.name] : "What happened"),
      el("p", { class: "names" }, run.folder), run.problems.map((problem) => el("p", { class: "notice" }, problem)),
      run.events.length ? el("ol", { class: "events" }, run.events.toReversed().map(eventRow)) : el("p", { class: "empty" }, this.emptyText()))));
  }

  /** The system's theme until the button chooses one. */
  #theme() {
    const system = window.matchMedia("(prefers-color-scheme: dark)");
    const apply = () => {
      const dark = (readStored("rlhf-theme") ?? this.#chosen ?? (system.matches ? "dark" : "light")) === "dark";
      document.documentElement.dataset.theme = dark ? "dark" : "light";
      byId("theme").textContent = dark ? "Light" : "Dark";
      byId("theme").setAttribute("aria-label", `Switch to the ${dark ? "light" : "dark"} theme`);
    };
    byId("theme").addEventListener("click", () => {
      this.#chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      store("rlhf-theme", this.#chosen);
      apply();
      this.#draw();
    });
    system.addEventListener("change", () => {
      apply();
      this.#draw();
    });
    apply();
  }
}

function eventRow(event) {
  const { stage, event: name, time, notes, format, ...facts } = event;
  const shown = Object.entries(facts).filter(([key]) => !(name === "start" && ["step", "unit"].includes(key)));
  const text = shown.map(([key, value]) => eventFact(key, value)).join("   ");
  return el("li", {}, el("time", {}, clock(time)), el("b", {}, visible(`${stage} ${name}`)), el("span", {}, visible(text)),
    Array.isArray(notes) && notes.length ? el("ul", {}, notes.map((note) => el("li", {}, visible(note)))) : null);
}

function eventFact(key, value) {
  if (key === "peak_bytes") return `peak memory ${(value / 1e9).toFixed(2)} GB`;
  if (key === "text") return value;
  return `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`;
}

/** Storage may be denied, as in files opened from disk. */
function readStored(key) {
  try {
    return window.localStorage.getItem(key);
  } catch {
    return null;
  }
}

function store(key, value) {
  try {
    window.localStorage.setItem(key, value);
  } catch {
    // the choice then lasts as long as the page
  }
}

const embedded = JSON.parse(byId("data").textContent);
const app = new App(embedded ? new ReportSource(embedded) : new LiveSource());
