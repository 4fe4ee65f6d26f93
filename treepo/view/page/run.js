"use strict";
// The tab "Run": the state of each run, its curves, and the tables of run-tables.js.

const { make, ask, repeat, part } = window.view;
const { chart, setRange } = window.view.charts;
const { runs, chosen, trained, PANELS, describe, otherPanels } = window.view.runs;
const { TABLES } = window.view.tables;

const REFRESH_SECONDS = 2;

const states = make("div", { className: "card runs" }, ...runs.map(stateRow));
const grid = make("div", { className: "charts" });
const otherGrid = make("div", { className: "charts" });
const others = make("details", { ontoggle: drawOthers }, make("summary", {}, "All other metrics"), otherGrid);
const controlBar = makeControls();
const drawn = new Map(); // charts by title

function describeState(run) {
  if (run.fault) return [make("span", { className: "fault" }, run.fault)];
  const { status, table } = run;
  if (!status) return [table.steps.length ? `${table.steps.at(-1)} steps` : "no training run"];
  const state = status.fault ? `dead or stuck: ${status.fault}` : status.reason ? `${status.state}: ${status.reason}` : status.state;
  const done = status.steps === null ? "" : ` · step ${status.step} of ${status.steps}`;
  const now = status.state === "running" ? [status.phase, ...status.waits].map((text) => ` · ${text}`) : [];
  return [make("span", { className: status.fault || status.reason ? "fault" : "" }, state), done, ...now];
}

// The line of a run: what hides it, and its state, which `refresh` fills.
function stateRow(run) {
  const swatch = make("span", { className: "swatch" });
  swatch.style.background = `var(--curve${run.index % 8})`;
  const box = make("input", { type: "checkbox", checked: true, onchange: () => { run.shown = box.checked; draw(); } });
  const name = make("span", { className: "name", title: run.path }, run.name);
  run.state = make("span", { className: "soft" });
  return make("div", { className: "bar" }, runs.length > 1 ? make("label", {}, box, swatch, name) : name, run.state);
}

function addChart(parent, panel, run) {
  const title = run && runs.length > 1 ? `${panel.title} · ${run.name}` : panel.title;
  if (drawn.has(title)) return;
  const added = chart(title, (range) => describe(panel, run, range));
  drawn.set(title, added);
  parent.append(added.frame);
  added.draw();
}

function drawOthers() {
  if (others.open) otherPanels().forEach((panel) => addChart(otherGrid, panel));
}

function draw() {
  for (const element of [controlBar, grid, others]) element.hidden = !trained();
  drawOthers();
  drawn.forEach((one) => one.draw());
  TABLES.forEach((table) => table.draw());
}

function makeControls() {
  const input = (properties, change) => make("input", { ...properties, oninput: (event) => { change(event.target); draw(); } });
  const x = make("select", { onchange: () => { chosen.x = x.value; setRange(null); } },
    make("option", { value: "step" }, "step"), make("option", { value: "time" }, "time"));
  const range = { type: "range", min: 0, max: 0.98, step: 0.02, value: 0 };
  const smoothing = input(range, (slider) => { chosen.smoothing = Number(slider.value); });
  const log = input({ type: "checkbox" }, (box) => { chosen.log = box.checked; });
  const events = input({ type: "checkbox", checked: true }, (box) => { chosen.events = box.checked; });
  const search = input({ type: "search", placeholder: "metric" }, (field) => {
    chosen.search = field.value.toLowerCase();
    others.open ||= Boolean(field.value);
  });
  return make("div", { className: "bar" },
    make("label", {}, "x axis ", x), make("label", {}, "smoothing ", smoothing), make("label", {}, log, "log axis"),
    make("label", {}, events, "events"), make("label", {}, "find ", search),
    make("button", { onclick: () => setRange(null) }, "show everything"));
}

// Reads a run again if its files have changed; returns whether they have.
async function read(run) {
  const source = { source: run.index };
  try {
    const { files, status, trees } = await ask("run/state", source);
    Object.assign(run, { status, trees, fault: "" });
    if (files === run.files) return false;
    const questions = ["metrics", "settings", "log", "result"].map((name) => ask(`run/${name}`, source));
    const [table, settings, log, result] = await Promise.all(questions);
    Object.assign(run, { table, settings, log, result, files });
    return true;
  } catch (error) {
    run.fault = error.message;
    return false;
  }
}

async function refresh() {
  const changed = await Promise.all(runs.map(read));
  runs.forEach((run) => run.state.replaceChildren(...describeState(run)));
  if (changed.some(Boolean)) draw();
}

part("run", (root) => {
  if (root.childElementCount) return;
  root.append(states, controlBar, grid, others, ...TABLES.map((table) => table.element));
  for (const panel of PANELS) (panel.bars ? runs : [undefined]).forEach((run) => addChart(grid, panel, run));
  repeat(REFRESH_SECONDS, refresh);
});
