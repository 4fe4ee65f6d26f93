"use strict";
// The drawing of a tree: a box for each segment, as long as its tokens and as high as the answers that share it.

const { make } = window.view;
const { choice, count, decimal } = window.view.trees;
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 400; // of a drawing, unless its rows become too high or too low, pixels
const [LOWEST, LEGIBLE, HIGHEST] = [8, 13, 22]; // rows, pixels
const MARKS = { correct: "✓", wrong: "✗", no_answer: "∅", timeout: "⏱", error: "!" };
const FULL = 0.75; // of a colour, on the card
const mix = (share, low, high) => `color-mix(in oklab, ${high} ${(100 * share).toFixed(1)}%, ${low})`;

// What a segment's colour says. value: of a segment, null if it is not known. ends: the values of the first and the
// last colour, for the lowest and highest value of the tree. digits: of the legend.
const COLOURS = {
  reward: {
    title: "mean reward",
    digits: 2,
    value: ({ reward }) => reward,
    ends: (low, high) => [Math.min(low, low < 0 ? -1 : 0), Math.max(high, 1)],
    colours: ["var(--wrong)", "var(--correct)"],
  },
  advantage: {
    title: "advantage (A+ plus A−)",
    digits: 3,
    value: ({ weights }) => weights && weights[0] + weights[1],
    ends: (low, high) => [-Math.max(-low, high), Math.max(-low, high)],
    colours: ["var(--warning)", "var(--line)", "var(--accent)"],
  },
  log_prob: {
    title: "mean log-prob",
    digits: 2,
    value: ({ log_prob }) => log_prob,
    ends: (low) => [low, 0],
    colours: ["var(--warning)", "var(--line)"],
  },
  version: {
    title: "newest weight version",
    digits: 0,
    value: ({ versions }) => Math.max(...versions.map(([version]) => version)),
    ends: (low, high) => [low, high],
    colours: ["var(--line)", "var(--accent)"],
  },
};

// d3's hierarchy of an answer to "trees/tree". For each node: its rows (x0 to x1, pixels), its place among the tokens
// of its path (start to end), and its leaf.
function hierarchy(answer, rowHeight) {
  const nodes = [{ node: 0, tokens: 0 }, ...answer.segments.map((segment, at) => ({ ...segment, node: at + 1 }))];
  const root = d3.stratify().id(({ node }) => node).parentId(({ parent }) => parent)(nodes).count();
  d3.partition().size([root.value * rowHeight, 1])(root);
  const leaves = new Map(answer.leaves.map((leaf) => [leaf.node, leaf]));
  return root.each((node) => {
    node.start = node.parent ? node.parent.end : 0;
    node.end = node.start + node.data.tokens;
    node.leaf = leaves.get(node.data.node);
  });
}

function describe(node, answer) {
  const { data, leaf, parent, start, end, value } = node;
  if (!parent) {
    const agreed = answer.agreed ? ` · stopped at ${count(answer.leaves.length, "answer")} with equal rewards` : "";
    return `Prompt · ${count(answer.prompt_tokens, "token")}${agreed}`;
  }
  const versions = data.versions.map(([version]) => version);
  const facts = [
    `Segment ${data.node}`,
    `tokens ${start + 1}–${end}`,
    `in ${value} of ${count(answer.leaves.length, "answer")}`,
    `mean log-prob ${decimal(data.log_prob)}`,
    `version${versions.length > 1 ? "s" : ""} ${versions.join(", ")}`,
  ];
  if (data.reward !== null) facts.push(`${leaf ? "" : "mean "}reward ${decimal(data.reward)}`);
  if (data.weights) facts.push(`A+\u00a0${decimal(data.weights[0], 3)}, A−\u00a0${decimal(data.weights[1], 3)}`);
  if (leaf) facts.push(leaf.verdict?.replace("_", " ") ?? "not graded", `ended by ${leaf.stop}`);
  if (data.draws > 1) facts.push(`for ${data.draws} children that began alike`);
  if (data.finish === "cut") facts.push("ended by a cut");
  if (data.cut) facts.push(whyAdded(data.cut));
  return facts.join(" · ");
}

// Why the tree went on with a segment after all its paths had ended.
function whyAdded({ leaf, right, graded }) {
  const place = leaf === null ? "the tree began again at the prompt" : `the answer of segment ${leaf} was cut`;
  const counts = right === null ? "" : ` where ${right} of ${count(graded, "graded answer")} were right`;
  return `sampled after ${place}${counts}`;
}

// The same in a few words, for a button.
function outline({ data, value }) {
  const reward = data.reward === null ? "" : ` · reward ${decimal(data.reward)}`;
  return `segment ${data.node} · ${count(data.tokens, "token")} · ${count(value, "answer")}${reward}`;
}

class TreeDrawing {
  // choose: called with the number of the node that was clicked or reached by a key.
  constructor(choose) {
    this.choose = choose;
    const titles = Object.entries(COLOURS).map(([name, { title }]) => [name, `colour: ${title}`]);
    this.mode = choice("Colour", titles, () => this.draw(this.answer, this.node));
    this.legend = make("span", { className: "legend soft" });
    this.boxes = make("div", { className: "drawing", onclick: (event) => this.click(event), onkeydown: (event) => this.move(event) });
    this.element = make("div", {}, make("div", { className: "bar" }, this.mode, this.legend), this.boxes);
  }

  find(number) {
    return this.root.find((node) => node.data.node === number);
  }

  draw(answer, node) {
    const rowHeight = Math.max(LOWEST, Math.min(HIGHEST, Math.floor(HEIGHT / answer.leaves.length)));
    Object.assign(this, { answer, root: hierarchy(answer, rowHeight) });
    const segments = this.root.descendants().slice(1);
    const paint = this.painter(segments.map(({ data }) => data));
    const width = Math.max(...segments.map(({ end }) => end));
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("height", this.root.x1);
    svg.append(...segments.map((segment) => this.box(segment, width, paint(segment.data))));
    const ends = this.root.leaves().map(({ leaf }) =>
      make("div", { className: leaf.verdict ?? "ungraded" }, `${MARKS[leaf.verdict] ?? "·"} ${leaf.stop}`));
    for (const end of ends) end.style.height = end.style.lineHeight = `${rowHeight}px`;
    this.boxes.replaceChildren(svg, make("div", { className: "ends", "aria-hidden": true, hidden: rowHeight < LEGIBLE }, ...ends));
    this.select(node);
  }

  // Draws the legend; returns a function from a segment to its colour.
  painter(segments) {
    const { title, digits, value, ends, colours } = COLOURS[this.mode.value];
    const values = segments.map(value).filter((one) => one !== null);
    const [low, high] = ends(Math.min(...values), Math.max(...values));
    const ramp = make("span", { className: "ramp" });
    ramp.style.background = `linear-gradient(to right in oklab, ${colours.join(", ")})`;
    this.legend.replaceChildren(...(values.length ? [decimal(low, digits), ramp, decimal(high, digits)] : [`${title}: not known`]));
    return (segment) => {
      if (value(segment) === null) return "var(--line)";
      const at = (high > low ? (value(segment) - low) / (high - low) : 1) * (colours.length - 1);
      const first = Math.min(Math.floor(at), colours.length - 2);
      return mix(FULL, "var(--card)", mix(at - first, colours[first], colours[first + 1]));
    };
  }

  box(segment, width, colour) {
    const box = document.createElementNS(SVG, "rect");
    const title = document.createElementNS(SVG, "title");
    title.textContent = describe(segment, this.answer);
    const attributes = {
      x: `${(100 * segment.start) / width}%`, width: `${(100 * segment.data.tokens) / width}%`,
      y: segment.x0, height: segment.x1 - segment.x0,
      class: segment.data.finish, role: "button", "aria-label": title.textContent, "data-node": segment.data.node,
    };
    for (const [name, value] of Object.entries(attributes)) box.setAttribute(name, value);
    box.style.fill = colour;
    box.append(title);
    return box;
  }

  select(number) {
    this.node = number;
    const focused = this.boxes.contains(document.activeElement);
    for (const box of this.boxes.querySelectorAll("rect")) {
      const here = Number(box.dataset.node) === (number || 1); // the prompt has no box
      box.classList.toggle("chosen", here && number > 0);
      box.setAttribute("tabindex", here ? 0 : -1);
      if (here) box.parentNode.append(box); // its outline is above the others
      if (here && focused) box.focus();
    }
  }

  click(event) {
    const { node } = event.target.closest("rect")?.dataset ?? {};
    if (node) this.choose(Number(node));
  }

  move(event) {
    const here = this.find(this.node || 1);
    const level = this.root.descendants().filter(({ depth }) => depth === here.depth);
    const at = level.indexOf(here);
    const next = { ArrowLeft: here.parent, ArrowRight: here.children?.[0], ArrowUp: level[at - 1], ArrowDown: level[at + 1] }[event.key];
    if (!next) return;
    event.preventDefault();
    this.choose(next.data.node);
  }
}

Object.assign(window.view.trees, { TreeDrawing, describe, mix, outline });
