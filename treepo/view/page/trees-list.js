"use strict";
// The list of trees: search, filters, orders, and a list of which only the rows in sight are elements.
// Texts are untrusted: they only ever become text nodes, and `visible` names what a browser hides or obeys.

const { ask, make, open, sources } = window.view;
const ROW = 48; // height of a row, pixels
const BEYOND = 4; // rows above and below those in sight
const UNSEEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|\p{Surrogate}/gu;

const codePoint = (one) => `⟨U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const visible = (text) => text.replace(UNSEEN, codePoint);
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const decimal = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));
const choice = (label, pairs, onchange) =>
  make("select", { "aria-label": label, onchange }, ...pairs.map(([value, text]) => make("option", { value }, text)));

// The trees of one source: columns of the server's index, which follows the file.
class Trees {
  // changed: called whenever there is something new to show.
  constructor(source, changed) {
    Object.assign(this, { source, changed, count: 0, mark: "", bytes: [0, 0], verdicts: [], reading: null });
    this.clear();
  }

  clear() {
    Object.assign(this, { columns: { step: [] }, prompts: [], questions: [], faults: {} });
  }

  // Reads all that the file has gained, and the questions after its first part and its last.
  async read() {
    for (let more = true; more;) {
      more = await this.readSome();
      const missing = this.questions.length < this.prompts.length;
      if (missing && !(more && this.questions.length)) {
        this.questions = (await ask("trees/prompts", { source: this.source })).questions;
        this.changed();
      }
    }
  }

  // Reads a part of it; returns whether there is more. Callers at the same time share one answer.
  readSome() {
    this.reading ??= this.askForRows().finally(() => { this.reading = null; });
    return this.reading;
  }

  async askForRows() {
    const answer = await ask("trees/rows", { source: this.source, from: this.count, mark: this.mark });
    const changes = answer.start !== this.count || answer.columns.step.length > 0;
    if (answer.start === 0) this.clear();
    for (const [name, values] of Object.entries(answer.columns)) this.columns[name] = (this.columns[name] ?? []).concat(values);
    this.prompts = this.prompts.concat(answer.prompts);
    Object.assign(this.faults, answer.faults);
    Object.assign(this, { mark: answer.mark, verdicts: answer.verdicts, bytes: answer.bytes, count: this.columns.step.length });
    if (changes) this.changed();
    return answer.more;
  }

  answers(tree, ...verdicts) {
    const numbers = this.columns.verdicts[tree];
    const counted = verdicts.length ? verdicts.map((verdict) => numbers[this.verdicts.indexOf(verdict)]) : numbers;
    return counted.reduce((sum, number) => sum + number, 0);
  }

  text(tree) {
    const prompt = this.columns.prompt[tree];
    return prompt < 0 ? this.faults[tree] : [...this.prompts[prompt], this.questions[prompt]].join(" ");
  }
}

const FILTERS = {
  all: ["all trees", () => true],
  mixed: ["right and wrong answers", (trees, tree) => trees.answers(tree, "correct") && trees.answers(tree, "wrong", "no_answer")],
  right: ["all correct", (trees, tree) => trees.answers(tree) && trees.answers(tree, "correct") === trees.answers(tree)],
  wrong: ["none correct", (trees, tree) => !trees.answers(tree, "correct")],
  empty: ["an answer missing", (trees, tree) => trees.answers(tree, "no_answer")],
  failed: ["a timeout or error", (trees, tree) => trees.answers(tree, "timeout", "error")],
  cut: ["a fallback cut", (trees, tree) => trees.columns.cuts[tree]],
};
// The tree with the greatest value is first.
const ORDERS = {
  first: ["oldest first", (_, tree) => -tree],
  last: ["newest first", (_, tree) => tree],
  disagreement: ["siblings disagree most", ({ disagreement }, tree) => disagreement[tree]],
  best: ["highest reward", ({ reward }, tree) => reward[tree] ?? -Infinity],
  worst: ["lowest reward", ({ reward }, tree) => -(reward[tree] ?? Infinity)],
  tokens: ["most tokens", ({ unique_tokens }, tree) => unique_tokens[tree]],
  sharing: ["most sharing", ({ unique_tokens, total_tokens }, tree) => total_tokens[tree] / unique_tokens[tree]],
};
const titles = (table) => Object.entries(table).map(([name, [title]]) => [name, title]);

class TreeList {
  constructor() {
    this.all = sources.map((_, source) => new Trees(source, () => { if (source === this.trees.source) this.choose(); }));
    this.trees = this.all[0];
    this.chosen = []; // the trees of the list, in its order
    this.selected = null;
    this.problem = ""; // that keeps the list from being up to date
    this.awaited = null; // a step to choose once its first tree is read
    const choose = () => this.choose();
    this.source = choice("Source", sources.map(({ name }, at) => [at, name]), () => open("trees", this.source.value));
    this.source.hidden = sources.length < 2;
    this.search = make("input", { type: "search", placeholder: "Search questions", "aria-label": "Search questions, gold answers and ids", oninput: choose });
    this.step = choice("Step", [], () => { this.awaited = null; choose(); });
    this.step.hidden = true; // until there are steps
    this.filter = choice("Filter", titles(FILTERS), choose);
    this.order = choice("Order", titles(ORDERS), choose);
    this.summary = make("div", { className: "soft", role: "status" }, "Reading the trees");
    this.rows = make("div", { className: "rows" });
    const events = { onscroll: () => this.draw(), onkeydown: (event) => this.move(event) };
    this.box = make("div", { className: "list", role: "listbox", tabIndex: 0, "aria-label": "Trees", ...events }, this.rows);
    const bar = make("div", { className: "bar" }, this.source, this.search, this.step, this.filter, this.order);
    this.element = make("div", { className: "card choice" }, bar, this.summary, this.box);
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  // Brings the trees up to date, or shows why that fails.
  async read() {
    try {
      await this.trees.read();
      this.problem = "";
    } catch (error) {
      this.problem = visible(error.message);
    }
    this.summarize();
  }

  select(source, tree) {
    if (this.trees !== this.all[source]) {
      this.trees = this.all[source];
      this.source.value = source;
      this.box.scrollTop = 0;
      this.choose();
    }
    this.selected = tree;
    const top = this.chosen.indexOf(tree) * ROW, { scrollTop, clientHeight } = this.box;
    if (top >= 0 && (top < scrollTop || top + ROW > scrollTop + clientHeight)) this.box.scrollTop = top - clientHeight / 2;
    this.draw();
  }

  // Lists all trees of a step.
  showStep(step) {
    this.awaited = step;
    this.search.value = "";
    this.filter.value = "all";
    this.box.scrollTop = 0;
    this.choose();
  }

  choose() {
    const { trees } = this;
    this.offerSteps();
    const step = this.step.value, words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [, passes] = FILTERS[this.filter.value], [, value] = ORDERS[this.order.value];
    const matches = (text) => words.every((word) => text.includes(word));
    this.chosen = [...trees.columns.step.keys()].filter((tree) =>
      (!step || trees.columns.step[tree] === Number(step)) && passes(trees, tree) && (!words.length || matches(trees.text(tree).toLowerCase())));
    const values = new Map(this.chosen.map((tree) => [tree, value(trees.columns, tree)]));
    this.chosen.sort((one, other) => values.get(other) - values.get(one) || one - other);
    this.summarize();
    this.rows.style.height = `${this.chosen.length * ROW}px`;
    this.draw();
  }

  summarize() {
    const { count: all, bytes: [read, size] } = this.trees;
    const reading = read < size ? ` · ${Math.floor((100 * read) / size)}% of the file read` : "";
    this.summary.textContent = this.problem || `${this.chosen.length.toLocaleString("en")} of ${count(all, "tree")}${reading}`;
  }

  offerSteps() {
    const steps = [...new Set(this.trees.columns.step)].filter((step) => step >= 0);
    this.step.hidden = !steps.length;
    const wanted = this.awaited ?? this.step.value;
    if (steps.length + 1 !== this.step.length)
      this.step.replaceChildren(...choice("", [["", "all steps"], ...steps.map((step) => [step, `step ${step}`])]).children);
    this.step.value = wanted !== "" && steps.includes(Number(wanted)) ? wanted : "";
    if (this.awaited !== null && this.step.value) this.awaited = null;
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - BEYOND);
    const last = Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + BEYOND;
    this.rows.replaceChildren(...this.chosen.slice(first, last).map((tree, at) => this.row(tree, first + at)));
    if (this.chosen.includes(this.selected)) this.box.setAttribute("aria-activedescendant", `tree-${this.selected}`);
  }

  row(tree, place) {
    const { columns, faults, prompts, questions, source } = this.trees;
    const about = { role: "option", id: `tree-${tree}`, "aria-selected": tree === this.selected, "aria-posinset": place + 1, "aria-setsize": this.chosen.length };
    const row = make("div", { ...about, className: "row", onclick: () => open("trees", `${source}/${tree}`) });
    row.style.top = `${place * ROW}px`;
    const prompt = columns.prompt[tree];
    if (prompt < 0) {
      row.append(make("div", { className: "line fault" }, visible(`line ${tree + 1}: ${faults[tree]}`)));
      return row;
    }
    const [id] = prompts[prompt];
    const facts = [
      columns.step[tree] < 0 ? "" : `step ${columns.step[tree]}`,
      columns.reward[tree] === null ? "" : `reward ${decimal(columns.reward[tree])} ±${decimal(columns.disagreement[tree])}`,
      count(columns.unique_tokens[tree], "token"),
      columns.cuts[tree] ? count(columns.cuts[tree], "cut") : "",
      visible(id),
    ];
    row.append(
      make("div", { className: "line" }, visible(questions[prompt] ?? id)),
      make("div", { className: "line soft", title: visible(id) }, this.bar(columns.verdicts[tree]), facts.filter(Boolean).join(" · ")));
    return row;
  }

  // The shares of the verdicts.
  bar(numbers) {
    const names = this.trees.verdicts.map((verdict) => verdict ?? "ungraded");
    const title = names.map((name, at) => `${numbers[at]} ${name.replace("_", " ")}`).filter((_, at) => numbers[at]).join(", ");
    const parts = names.map((name, at) => {
      const part = make("span", { className: name });
      part.style.flexGrow = numbers[at];
      return part;
    });
    return make("span", { className: "verdicts", title, role: "img", "aria-label": title }, ...parts);
  }

  move(event) {
    const screen = Math.max(1, Math.floor(this.box.clientHeight / ROW) - 1);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: screen, PageUp: -screen, Home: -Infinity, End: Infinity }[event.key];
    if (!step || !this.chosen.length) return;
    event.preventDefault();
    const place = Math.min(this.chosen.length - 1, Math.max(0, this.chosen.indexOf(this.selected) + step));
    open("trees", `${this.trees.source}/${this.chosen[place]}`);
  }
}

window.view.trees = { TreeList, choice, count, decimal, titles, visible };
