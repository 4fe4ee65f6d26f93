"use strict";
// The tables of the tab "Run": results, events, configuration, log. Each has an `element` and `draw()`.

const { make } = window.view;
const { format } = window.view.charts;
const { runs, trained, shownRuns } = window.view.runs;

const when = (time) => new Date(1000 * time).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const table = (head, rows) => {
  const titles = head.map((text) => make("th", { scope: "col" }, text));
  const whole = make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows));
  return make("div", { className: "scroll" }, whole);
};
const row = (cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
const section = (title, draw, ...controls) => {
  const body = make("div");
  const bar = make("div", { className: "bar", hidden: !controls.length }, ...controls);
  const element = make("details", {}, make("summary", {}, title), bar, body);
  return { element, draw: () => draw(body, element) };
};
const redraw = () => TABLES.forEach((one) => one.draw());
const check = (checked) => make("input", { type: "checkbox", checked, onchange: redraw });
const searchField = (placeholder) => make("input", { type: "search", placeholder, oninput: redraw });
const has = (text, field) => text.toLowerCase().includes(field.value.toLowerCase());

// What the shown runs have by key, one row a key and one column a run; `keep` chooses rows by cells and difference.
function comparison(mappings, keep) {
  const keys = new Set(mappings.flatMap(Object.keys));
  const text = (value) => (typeof value === "number" ? format(value) : String(value ?? "–"));
  const rows = [...keys].map((key) => [key, ...mappings.map((mapping) => text(mapping[key]))]);
  const differs = (cells) => new Set(cells.slice(1)).size > 1;
  return table(["", ...shownRuns().map((run) => run.name)],
    rows.filter((cells) => keep(cells, differs(cells))).map((cells) => row(cells)));
}

function drawResults(body, element) {
  const scored = shownRuns().filter((run) => run.result.scores.length);
  const summaries = shownRuns().map((run) => run.result.summary);
  const finished = summaries.some((summary) => Object.keys(summary).length);
  element.hidden = !scored.length && !finished;
  element.open ||= !trained();
  body.replaceChildren(
    ...scored.map((run) => table([run.name, ...run.result.scores[0].slice(1)], run.result.scores.slice(1).map((cells) => row(cells)))),
    ...(finished ? [comparison(summaries, () => true)] : []));
}

function drawEvents(body, element) {
  const events = shownRuns().flatMap((run) => run.log.events.map((entry) => [run, entry]));
  events.sort(([, [first]], [, [second]]) => second - first);
  element.hidden = !events.length;
  element.firstChild.textContent = `Events (${events.length})`;
  body.replaceChildren(...events.map(([run, [time, level, , text]]) =>
    make("div", { className: "event" },
      make("span", { className: "soft" }, `${when(time)} · ${run.name}`), make("pre", { className: level }, text))));
}

const onlyDifferences = check(runs.length > 1);
const keySearch = searchField("key or value");
function drawSettings(body, element) {
  const settings = shownRuns().map((run) => run.settings);
  element.hidden = !settings.some((one) => Object.keys(one).length);
  const all = !onlyDifferences.checked || runs.length === 1;
  body.replaceChildren(comparison(settings, (cells, differs) => (all || differs) && has(cells.join(" "), keySearch)));
}

const onlyWarnings = check(false);
const logSearch = searchField("text");
function drawLog(body, element) {
  element.hidden = !shownRuns().some((run) => run.log.entries.length);
  body.replaceChildren(...shownRuns().map((run) => make("pre", { className: "card log", tabIndex: 0, ariaLabel: `log of ${run.name}` },
    ...run.log.entries.filter(([, level, , text]) => has(text, logSearch) && !(onlyWarnings.checked && level === "INFO"))
      .map(([time, level, logger, text]) => make("span", { className: level }, `${when(time)} ${level} ${logger}: ${text}\n`)))));
}

const TABLES = [
  section("Result", drawResults),
  section("Events", drawEvents),
  section("Configuration", drawSettings, make("label", { hidden: runs.length === 1 }, onlyDifferences, "only differences"), keySearch),
  section("Log", drawLog, make("label", {}, onlyWarnings, "only warnings and errors"), logSearch),
];
window.view.tables = { TABLES };
