"use strict";
// Curves and stacked bars, drawn by uPlot. All charts of the page share the range of their x axis and the cursor.

const { make, colour } = window.view;
const charts = new Set();
const CURSOR = "run"; // the key by which uPlot moves all cursors together
const MOST_POINTS = 40; // of a curve, up to which they are drawn
const MARK_DISTANCE = 5; // CSS pixels from a mark within which its text is shown
const HEIGHT = 200;
const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap((zeros) => [1, 2, 5].map((first) => first * 10 ** zeros)); // between ticks of steps
let range = null; // [from, to] on the x axis; null: everything

function format(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return Number(value.toPrecision(3)).toExponential();
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

// The exponential average of past values, in which the first ones do not count more than others; null stays null.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = sum * weight + value;
    total = total * weight + 1;
    return sum / total;
  });
}

const positive = (values) => values.map((value) => (value > 0 ? value : null));
const isNumber = (value) => value !== null && value !== undefined;

// A curve's series for uPlot; with smoothing a second one, faint, has the values themselves.
function curveSeries(line, smoothing, log) {
  const values = log ? positive(line.values) : line.values;
  const few = values.filter(isNumber).length <= MOST_POINTS;
  const points = { show: few, size: 5 };
  const series = (drawn, more) => ({
    xs: line.xs, drawn, options: { stroke: line.colour, width: 1.5, dash: line.dash, spanGaps: true, points, ...more },
  });
  if (!smoothing) return [series(values)];
  return [series(values, { alpha: 0.3 }), series(smoothed(values, smoothing), { points: { show: false } })];
}

// Each bar's part and all parts below it, the top one first, so that a later one is drawn over an earlier one.
function barSeries(lines) {
  const paths = uPlot.paths.bars({ size: [0.9, 80] });
  return lines.map((line, place) => ({
    xs: line.xs,
    drawn: line.xs.map((_, index) => lines.slice(place).reduce((sum, below) => sum + (below.values[index] ?? 0), 0)),
    options: { stroke: line.colour, fill: line.colour, width: 0, points: { show: false }, paths },
  }));
}

function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.globalAlpha = 0.6;
  for (const mark of marks) {
    const x = plot.valToPos(mark.x, "x", true);
    if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
    ctx.strokeStyle = mark.colour;
    ctx.setLineDash(mark.text ? [4, 3] : []);
    ctx.beginPath();
    ctx.moveTo(x, mark.text ? bbox.top : bbox.top + bbox.height - 5);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

function axis(options) {
  const line = { stroke: colour("line"), width: 1 };
  return { stroke: colour("soft"), font: "11px system-ui", grid: line, ticks: { ...line, size: 4 }, ...options };
}

// All numbers 1, 2 and 5 times a power of ten from one of them, at or below `least`, to one at or above `most`.
function roundNumbers(least, most) {
  const powers = [];
  for (let power = Math.floor(Math.log10(least)); power <= Math.ceil(Math.log10(most)); power++) powers.push(power);
  const all = powers.flatMap((power) => [1, 2, 5].map((factor) => Number(`${factor}e${power}`)));
  return all.slice(all.findLastIndex((one) => one <= least), all.findIndex((one) => one >= most) + 1);
}

function rangeOfLogarithms(_, least, most) {
  if (least === null) return [1, 10];
  const all = roundNumbers(least, most);
  return all.length > 1 ? [all[0], all.at(-1)] : [least / 2, least * 2];
}

// Where a logarithmic axis has ticks: at up to eight round numbers, else at powers of ten, every second or third of many.
function logarithmicTicks(_, __, least, most) {
  const all = roundNumbers(least, most).filter((one) => one >= least && one <= most);
  if (all.length <= 8) return all;
  const powers = all.filter((one) => Number.isInteger(Math.log10(one)));
  return powers.filter((_, at) => at % Math.ceil(powers.length / 8) === 0);
}

// The range of the y axis; of equal values, one around them.
function rangeOfValues(_, least, most) {
  if (least === null) return [0, 1];
  const room = Math.abs(least) || 1;
  return least === most ? [least - room, least + room] : uPlot.rangeNum(least, most, 0.1, true);
}

const widthOf = (canvas) => Math.max(canvas.clientWidth, 100);

function setRange(next) {
  range = next;
  for (const chart of charts) chart.draw();
}

// Where the cursor is on the x axis; null if there is none.
const cursorX = ({ cursor, data }) => (isNumber(cursor.idx) && cursor.left >= 0 ? data[0][cursor.idx] : null);

// Move the cursor to the next point that is shown (by = 1) or the one before (by = -1).
function moveCursor(plot, by) {
  const { min, max } = plot.scales.x;
  const shown = plot.data[0].filter((x) => x >= min && x <= max);
  const now = cursorX(plot);
  const at = now !== null ? shown.indexOf(now) + by : by > 0 ? 0 : shown.length - 1;
  const x = shown[Math.min(Math.max(at, 0), shown.length - 1)];
  if (shown.length) plot.setCursor({ left: plot.valToPos(x, "x"), top: HEIGHT / 3 }, true, true);
}

function zoomBy(plot, factor) {
  const { min, max } = plot.scales.x;
  const middle = cursorX(plot) ?? (min + max) / 2;
  setRange([middle - (middle - min) * factor, middle + (max - middle) * factor]);
}

const KEYS = {
  ArrowLeft: (plot) => moveCursor(plot, -1),
  ArrowRight: (plot) => moveCursor(plot, 1),
  "+": (plot) => zoomBy(plot, 0.5),
  "-": (plot) => zoomBy(plot, 2),
  Escape: () => setRange(null),
};

// Below a chart, a button for each label, which switches its lines off, and their values at x or their last ones.
function drawLegend(legend, lines, hidden, x, redraw) {
  const value = (line) => {
    const index = x === null ? line.values.findLastIndex(isNumber) : line.xs.indexOf(x);
    const text = make("span", {}, format(line.values[index]));
    text.style.color = line.colour;
    return text;
  };
  const item = ([label, same]) => {
    const key = make("i");
    const { dash, colour: own, meaning } = same[0];
    const stroke = !dash?.length ? "solid" : dash[0] < 4 ? "dotted" : "dashed";
    key.style.borderTop = `3px ${stroke} ${same.length > 1 ? "currentColor" : own}`;
    const onclick = () => { hidden[hidden.has(label) ? "delete" : "add"](label); redraw(); };
    return make("button", { onclick, title: meaning ?? "", ariaPressed: !hidden.has(label) }, key, label, ...(hidden.has(label) ? [] : same.map(value)));
  };
  legend.replaceChildren(...Map.groupBy(lines, (line) => line.label).entries().map(item));
}

// A chart of what `describe(range)` returns: `lines`, each with label, meaning, xs, values, colour and dash; `bars`:
// whether they are stacked; `marks` on the x axis, whose text is shown under the cursor or, without one, is a tick;
// `unit` of the x axis, `smoothing` from 0 to 1, whether the y axis is logarithmic, and `linkAt(x)`: the text and the
// action of the button that a click at x shows, or null.
function chart(title, describe) {
  const caption = make("span", { className: "soft" });
  const link = make("button", { hidden: true });
  const hint = make("div", { className: "hint", hidden: true });
  const ariaLabel = `${title}. Arrow keys move the cursor, + and - zoom, Escape shows everything.`;
  const canvas = make("div", { tabIndex: 0, role: "img", ariaLabel });
  const legend = make("div", { className: "legend" });
  const head = make("figcaption", {}, make("span", { title }, title), caption, link);
  const frame = make("figure", { className: "card chart" }, head, canvas, legend, hint);
  const hidden = new Set(); // labels that are switched off
  let plot = null;

  function drawCursor({ lines, marks, unit }) {
    const x = cursorX(plot);
    caption.textContent = x === null ? "" : unit === "step" ? `step ${format(x)}` : `${format(x)} ${unit}`;
    drawLegend(legend, lines, hidden, x, draw);
    const near = marks.filter((mark) => mark.text && Math.abs(plot.valToPos(mark.x, "x") - plot.cursor.left) <= MARK_DISTANCE);
    hint.hidden = !near.length || x === null || !frame.matches(":hover, :focus-within");
    hint.textContent = near.map((mark) => mark.text).join("\n");
  }

  function showLink() {
    const found = cursorX(plot) === null ? null : describe(range).linkAt(cursorX(plot));
    link.hidden = !found;
    if (found) [link.textContent, link.onclick] = found;
  }

  function options(shown, series, log, drawn) {
    const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick, 7)));
    const bars = shown.bars && ((_, __, most) => [0, most * 1.05 || 1]);
    const margin = (least, most) => (least === most ? 1 : shown.bars ? 0.5 : 0);
    const selected = ({ select, posToVal }) => [posToVal(select.left, "x"), posToVal(select.left + select.width, "x")];
    return {
      width: widthOf(canvas), height: HEIGHT, legend: { show: false }, series: [{}, ...series.map((one) => one.options)],
      axes: [
        axis({ size: 28, ...(shown.unit === "step" && { incrs: WHOLE }) }),
        axis({ size: 54, space: 26, values, ...(log && { splits: logarithmicTicks, filter: (_, ticks) => ticks }) }),
      ],
      scales: {
        x: { time: false, range: (_, least, most) => range ?? [least - margin(least, most), most + margin(least, most)] },
        y: log ? { distr: 3, range: rangeOfLogarithms } : { range: bars || rangeOfValues },
      },
      cursor: {
        sync: { key: CURSOR }, points: { size: 6 }, drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => setRange(null) },
      },
      hooks: {
        ready: [drawn, (self) => self.over.addEventListener("click", showLink)],
        draw: [(self) => drawMarks(self, shown.marks)],
        setCursor: [() => plot && drawCursor(shown)],
        setSelect: [(self) => self.select.width > 2 && setRange(selected(self))],
      },
    };
  }

  function draw() {
    const shown = describe(range);
    const lines = shown.lines.filter((line) => !hidden.has(line.label));
    const log = shown.log && !shown.bars && lines.some((line) => line.values.some((value) => value > 0));
    const series = shown.bars ? barSeries(lines) : lines.flatMap((line) => curveSeries(line, shown.smoothing, log));
    frame.hidden = !shown.lines.length;
    if (frame.hidden) return;
    const x = plot && cursorX(plot);
    plot?.destroy();
    const data = series.length ? uPlot.join(series.map(({ xs, drawn }) => [xs, drawn])) : [[]];
    const drawn = (self) => {
      plot = self;
      if (isNumber(x)) plot.setCursor({ left: plot.valToPos(x, "x"), top: HEIGHT / 3 });
      drawCursor(shown);
    };
    plot = new uPlot(options(shown, series, log, drawn), data, canvas);
  }

  canvas.addEventListener("keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    KEYS[event.key](plot);
    showLink();
  });
  new ResizeObserver(() => plot && canvas.clientWidth && plot.setSize({ width: widthOf(canvas), height: HEIGHT })).observe(canvas);
  const own = { frame, draw };
  charts.add(own);
  return own;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setRange(range));
window.view.charts = { chart, setRange, isNumber, format };
