"use strict";
// What the tab "Run" draws: its runs, what is chosen, and the lines and marks of each chart. No element is made here.

const { colour, open, sources } = window.view;
const { isNumber } = window.view.charts;

const MOST_BARS = 120; // beyond, a bar is the mean of several steps
const MOST_UPDATES = 100; // of the weights, that are marked
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [12, 4], [1, 2]];
const VERDICTS = { // their colours
  "verdict/correct": "correct", "verdict/wrong": "wrong", "verdict/no_answer": "none", "verdict/timeout": "ungraded",
};
const PHASES = /^seconds\/(?!step$)/;
const PANELS = [ // a title and the metrics, by name or pattern; log: the y axis is always logarithmic
  { title: "Reward", names: ["reward", "reward_with_terms"] },
  { title: "Accuracy", names: ["accuracy", /^heldout\/(.+\/)?accuracy$/] },
  { title: "Answers by verdict, share", names: [/^verdict\//] },
  { title: "Tokens of an answer", names: ["response_tokens", /^heldout\/(.+\/)?response_tokens$/] },
  { title: "Tokens of all answers / tokens decoded", names: ["total_over_unique"] },
  { title: "Why answers end, share", names: [/^stop\//] },
  { title: "Log-prob difference of engine and trainer", names: ["logprob_difference_mean", "logprob_difference_max"], log: true },
  { title: "Clipped tokens, share", names: ["train/clip_low", "train/clip_high", "train/dual_clip"] },
  { title: "Importance weights", names: ["train/importance", "train/importance_min", "train/importance_max"] },
  { title: "Entropy", names: ["train/entropy"] },
  { title: "KL", names: ["train/old_kl", "train/reference_kl"] },
  { title: "Gradient norm", names: ["train/grad_norm"] },
  { title: "Seconds of a step", names: [PHASES], bars: true },
  { title: "Idle, share of the time", names: ["idle/engines", "idle/trainer"] },
  { title: "Tokens decoded a second", names: ["rollout/tokens_per_second"] },
  { title: "Staleness of trained tokens, versions", names: ["staleness/mean", "staleness/max"] },
];

const runs = sources.map((source, index) => ({
  ...source, index, shown: true, files: null, status: null, fault: "", settings: {}, result: { summary: {}, scores: [] },
  table: { steps: [], times: [], columns: {}, meanings: {} }, trees: false, log: { entries: [], events: [] },
}));
const chosen = { x: "step", smoothing: 0, log: false, events: true, search: "" };
const trained = () => runs.some((run) => run.table.steps.length);
const shownRuns = () => runs.filter((run) => run.shown);
const fits = (name, names) => names.some((wanted) => (wanted instanceof RegExp ? wanted.test(name) : wanted === name));
const runColour = (run) => colour(`curve${run.index % 8}`);

// When a run began: before its first step.
const began = (run) => run.table.times[0] - (run.table.columns["seconds/step"]?.[0] ?? 0);

// Seconds in one unit of the x axis, and its name.
function timeUnit() {
  const longest = Math.max(0, ...shownRuns().map((run) => run.table.times.at(-1) - began(run) || 0));
  return longest > 7200 ? [3600, "hours"] : longest > 120 ? [60, "minutes"] : [1, "seconds"];
}

function xsOf(run) {
  if (chosen.x === "step") return run.table.steps;
  const [seconds] = timeUnit();
  return run.table.times.map((time) => (time - began(run)) / seconds);
}

// Where a time is on the x axis: between the steps before and after it.
function xOfTime(run, time) {
  if (chosen.x === "time") return (time - began(run)) / timeUnit()[0];
  const { steps, times } = run.table;
  const next = times.findIndex((other) => other >= time);
  if (next < 0) return steps.at(-1);
  const before = next ? times[next - 1] : began(run);
  const stepBefore = next ? steps[next - 1] : steps[0] - 1;
  return stepBefore + (steps[next] - stepBefore) * Math.max((time - before) / (times[next] - before), 0);
}

function marksOf(run, range) {
  if (!chosen.events || !run.table.steps.length) return [];
  const level = { WARNING: "warning", INFO: "accent" };
  const events = run.log.events.map(([time, name, , text]) => ({
    x: xOfTime(run, time), colour: colour(level[name] ?? "wrong"), text: runs.length > 1 ? `${run.name}: ${text}` : text,
  }));
  const [from, to] = range ?? [-Infinity, Infinity];
  const updates = chosen.x === "time" ? xsOf(run).filter((x) => x >= from && x <= to).map((x) => ({ x, colour: runColour(run) })) : [];
  return updates.length > MOST_UPDATES ? events : [...updates, ...events];
}

// The curves of a panel: coloured by metric if one run is shown, else by run and dashed by metric.
function curves(names) {
  const shown = shownRuns();
  const line = (run, xs, name, place) => ({
    label: name, meaning: run.table.meanings[name], xs, values: run.table.columns[name],
    colour: shown.length > 1 ? runColour(run) : colour(VERDICTS[name] ?? `curve${place % 8}`),
    dash: shown.length > 1 ? DASHES[place % DASHES.length] : [],
  });
  return shown.flatMap((run) => {
    const xs = xsOf(run);
    const known = Object.keys(run.table.columns).filter((name) => fits(name, names) && run.table.columns[name].some(isNumber));
    return known.map((name, place) => line(run, xs, name, place));
  });
}

// The phases of a run's steps and the rest of each step, in means of so many steps that the bars stay apart.
function phaseBars(run, range) {
  const { columns } = run.table;
  const names = Object.keys(columns).filter((name) => PHASES.test(name));
  const xs = xsOf(run);
  const [from, to] = range ?? [-Infinity, Infinity];
  const inside = xs.map((_, at) => at).filter((at) => xs[at] >= from && xs[at] <= to && isNumber(columns["seconds/step"]?.[at]));
  const size = Math.ceil(inside.length / MOST_BARS) || 1;
  const bins = [];
  for (let at = 0; at < inside.length; at += size) bins.push(inside.slice(at, at + size));
  const mean = (bin, value) => bin.reduce((sum, at) => sum + value(at), 0) / bin.length;
  const rest = (at) => Math.max(columns["seconds/step"][at] - names.reduce((sum, name) => sum + (columns[name][at] ?? 0), 0), 0);
  const line = (label, value, place) => ({
    label, xs: bins.map((bin) => mean(bin, (at) => xs[at])), values: bins.map((bin) => mean(bin, value)),
    colour: colour(`curve${place % 8}`), meaning: run.table.meanings[label],
  });
  if (!bins.length) return [];
  return [...names.map((name, place) => line(name, (at) => columns[name][at] ?? 0, place)), line("rest of the step", rest, 7)];
}

// The button that leads to the trees of the step next to x, of the first run that is shown and has trees.
function treesAt(x) {
  const run = shownRuns().find((one) => one.trees && one.table.steps.length);
  if (!run) return null;
  const distances = xsOf(run).map((other) => Math.abs(other - x));
  const step = run.table.steps[distances.indexOf(Math.min(...distances))];
  return [`trees of step ${step}`, () => open("trees", `${run.index}/step-${step}`)];
}

// What a chart of a panel draws in a range of the x axis; run: the only one, for bars.
function describe(panel, run, range) {
  const lines = panel.bars ? (run.shown ? phaseBars(run, range) : []) : curves(panel.names);
  const wanted = [panel.title, ...lines.map((line) => line.label)].some((text) => text.toLowerCase().includes(chosen.search));
  return {
    lines: wanted ? lines : [], bars: panel.bars,
    marks: (panel.bars ? [run] : shownRuns()).flatMap((one) => marksOf(one, range)),
    unit: chosen.x === "step" ? "step" : timeUnit()[1], smoothing: chosen.smoothing, log: chosen.log || panel.log,
    linkAt: treesAt,
  };
}

// The metrics that no panel has, each a panel of its own.
function otherPanels() {
  const names = new Set(runs.flatMap((run) => Object.keys(run.table.columns)));
  return [...names].filter((name) => !PANELS.some((panel) => fits(name, panel.names))).map((name) => ({ title: name, names: [name] }));
}

window.view.runs = { runs, chosen, trained, shownRuns, runColour, PANELS, describe, otherPanels, xOfTime };
