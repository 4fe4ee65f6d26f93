"use strict";
// Texts come from models and data files, so they are only ever set as textContent.
const problems = JSON.parse(document.getElementById("data").textContent).problems;
const PAGE = 100; // rows drawn at once
const body = document.querySelector("#problems tbody");
const view = { key: "place", down: false, rows: problems, drawn: 0 };

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

function percent(share) {
  return share === null ? "–" : (100 * share).toFixed(0) + "%";
}

function path(problem, segment) {
  const above = [];
  for (let at = segment; at >= 0; at = problem.segments[at][0]) above.unshift(at);
  return above;
}

// For each segment: its first token, its first row, and its number of rows (leaves below it). Rows are in depth-first order.
function layout(problem) {
  const row = new Map(problem.leaves.map(([segment]) => segment).sort((a, b) => a - b).map((s, i) => [s, i]));
  const boxes = problem.segments.map(([parent, tokens]) => ({ parent, tokens, start: 0, first: Infinity, rows: 0 }));
  boxes.forEach((box) => { if (box.parent >= 0) box.start = boxes[box.parent].start + boxes[box.parent].tokens; });
  for (let at = boxes.length - 1; at >= 0; at--) {
    const box = boxes[at];
    if (row.has(at)) { box.first = row.get(at); box.rows = 1; }
    if (box.parent >= 0) {
      boxes[box.parent].first = Math.min(boxes[box.parent].first, box.first);
      boxes[box.parent].rows += box.rows;
    }
  }
  return boxes;
}

function drawTree(problem, show) {
  const HEIGHT = 16;
  const boxes = layout(problem);
  const width = Math.max(...boxes.map((box) => box.start + box.tokens));
  const verdicts = new Map(problem.leaves.map(([segment, verdict]) => [segment, verdict]));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("height", problem.leaves.length * HEIGHT);
  boxes.forEach((box, at) => {
    const rect = document.createElementNS(svg.namespaceURI, "rect");
    const verdict = verdicts.get(at);
    rect.setAttribute("x", (100 * box.start) / width + "%");
    rect.setAttribute("width", (100 * box.tokens) / width + "%");
    rect.setAttribute("y", box.first * HEIGHT);
    rect.setAttribute("height", box.rows * HEIGHT);
    rect.setAttribute("tabindex", "0");
    rect.setAttribute("role", "button");
    if (verdict) rect.setAttribute("class", verdict);
    const title = document.createElementNS(svg.namespaceURI, "title");
    title.textContent = `${box.tokens} tokens, in ${box.rows} of ${problem.leaves.length} responses` +
      (verdict ? `, ${verdict.replace("_", " ")}` : "");
    rect.append(title);
    const choose = () => {
      svg.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
      rect.classList.add("chosen");
      show(title.textContent, problem.segments[at][2]);
    };
    rect.addEventListener("click", choose);
    rect.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } });
    svg.append(rect);
  });
  return svg;
}

function completion(problem, boxes, index, shared) {
  const [segment, verdict, stop, answer] = problem.leaves[index];
  const node = make("details");
  const summary = make("summary", `${index + 1}. `);
  const tokens = boxes[segment].start + boxes[segment].tokens;
  summary.append(make("b", verdict.replace("_", " "), verdict));
  summary.append(`${answer === null ? "" : ` · ${answer}`} · ${tokens} tokens · ended by ${stop}`);
  node.append(summary);
  node.addEventListener("toggle", () => {
    if (!node.open || node.childElementCount > 1) return;
    const text = make("pre", undefined, "text");
    path(problem, segment).forEach((at) => {
      text.append(make("span", problem.segments[at][2], shared && boxes[at].rows === 1 ? "alone" : ""));
    });
    node.append(text);
  });
  return node;
}

function detail(problem) {
  const row = make("tr", undefined, "detail");
  const cell = make("td");
  cell.colSpan = 4;
  const boxes = layout(problem);
  cell.append(make("h3", "question"), make("pre", problem.question, "text"));
  cell.append(make("h3", "gold answer"), make("pre", problem.gold));
  const whole = make("details");
  whole.append(make("summary", "prompt, as the model reads it"), make("pre", problem.prompt, "text"));
  cell.append(whole);
  const shared = problem.total > problem.tokens;
  cell.append(make("h3", `${problem.leaves.length} responses, ${problem.tokens} tokens decoded` +
    (shared ? `; one by one ${problem.total}` : "") + "; each response is a row, select a segment to read it"));
  const frame = make("div", undefined, "tree");
  const chosen = make("div");
  frame.append(drawTree(problem, (what, text) => {
    chosen.replaceChildren(make("h3", what), make("pre", text, "text"));
  }));
  cell.append(frame, chosen, make("h3", "responses" + (shared ? " (highlighted: text that no other response shares)" : "")));
  problem.leaves.forEach((_, index) => cell.append(completion(problem, boxes, index, shared)));
  row.append(cell);
  return row;
}

function problemRow(problem) {
  const row = make("tr");
  const first = make("td");
  const open = make("button", undefined, "open");
  open.setAttribute("aria-expanded", "false");
  open.append(make("b", problem.id), make("span", problem.question.slice(0, 200)));
  first.append(open);
  row.append(first, make("td", percent(problem.mean)), make("td", percent(problem.majority)), make("td", problem.tokens.toLocaleString("en")));
  open.addEventListener("click", () => {
    const shown = open.getAttribute("aria-expanded") === "true";
    open.setAttribute("aria-expanded", String(!shown));
    if (shown) row.nextElementSibling.remove(); else row.after(detail(problem));
  });
  return row;
}

function drawMore() {
  view.rows.slice(view.drawn, view.drawn + PAGE).forEach((problem) => body.append(problemRow(problem)));
  view.drawn = Math.min(view.drawn + PAGE, view.rows.length);
  document.getElementById("more").hidden = view.drawn === view.rows.length;
  document.getElementById("count").textContent = `${view.rows.length} of ${problems.length} problems`;
}

function draw() {
  const benchmark = document.getElementById("benchmark").value;
  const outcome = document.getElementById("outcome").value;
  const wanted = document.getElementById("search").value.toLowerCase();
  const fits = { "": () => true, never: (m) => m === 0, always: (m) => m === 1, sometimes: (m) => m > 0 && m < 1 }[outcome];
  view.rows = problems.filter((problem) => (!benchmark || problem.benchmark === benchmark) &&
    fits(problem.mean) &&
    (!wanted || `${problem.id} ${problem.question} ${problem.gold}`.toLowerCase().includes(wanted)));
  const sign = view.down ? -1 : 1;
  view.rows.sort((a, b) => sign * ((a[view.key] ?? -1) - (b[view.key] ?? -1)) || a.place - b.place);
  document.querySelectorAll("#problems thead th").forEach((head) => {
    const mine = head.firstElementChild.dataset.key === view.key;
    head.setAttribute("aria-sort", mine ? (view.down ? "descending" : "ascending") : "none");
  });
  body.replaceChildren();
  view.drawn = 0;
  drawMore();
}

const benchmarks = [...new Set(problems.map((problem) => problem.benchmark))];
const number = (problem) => Number(problem.id.slice(problem.benchmark.length + 1));
problems.sort((a, b) => benchmarks.indexOf(a.benchmark) - benchmarks.indexOf(b.benchmark) || number(a) - number(b));
problems.forEach((problem, place) => { problem.place = place; });
benchmarks.forEach((name) => document.getElementById("benchmark").append(make("option", name)));
document.querySelectorAll("#problems thead button").forEach((button) => button.addEventListener("click", () => {
  view.down = view.key === button.dataset.key && !view.down;
  view.key = button.dataset.key;
  draw();
}));
["benchmark", "outcome", "search"].forEach((id) => document.getElementById(id).addEventListener("input", draw));
document.getElementById("more").addEventListener("click", drawMore);
draw();
