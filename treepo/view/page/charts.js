"use strict";
// Curves and stacked bars, drawn by uPlot. All charts of the page share the range of their x axis and the cursor.

const { make, colour } = window.view;
const charts = new Set();
const CURSOR = "run"; // the key by which uPlot moves all cursors together
const MARK_DISTANCE = 5; // CSS pixels from a mark within which its text is shown
let range = null; // [from, to] on the x axis; null: everything

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e7) ? value.toExponential(2) : value.toLocaleString("en", { maximumSignificantDigits: 4 });
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
function curveSeries(line, show, smoothing, log) {
  const values = log ? positive(line.values) : line.values;
  const few = values.filter(isNumber).length <= 40;
  const series = (drawn, more) => ({
    xs: line.xs, drawn,
    options: { label: line.label, stroke: line.colour, width: 1.5, dash: line.dash, spanGaps: true, show, points: { show: few, size: 5 }, ...more },
  });
  if (!smoothing) return [series(values, { value: (_, value) => format(value) })];
  const value = (plot, smooth, at, index) => (index === null ? "–" : `${format(smooth)} (${format(plot.data[at + 1][index])})`);
  return [
    series(smoothed(values, smoothing), { value, points: { show: false } }),
    series(values, { class: "faint", alpha: 0.3 }),
  ];
}

// Each bar's part and all parts below it, the top one first, so that a later one is drawn over an earlier one.
function barSeries(lines, hidden) {
  const shown = lines.filter((line) => !hidden.has(line.label));
  return lines.map((line) => ({
    xs: line.xs,
    drawn: line.xs.map((_, index) => shown.slice(shown.indexOf(line)).reduce((sum, below) => sum + (below.values[index] ?? 0), 0)),
    options: {
      label: line.label, stroke: line.colour, fill: line.colour, width: 0, points: { show: false }, show: shown.includes(line),
      paths: uPlot.paths.bars({ size: [0.9, 80] }), value: (_, __, ___, index) => format(line.values[index]),
    },
  }));
}

function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  ctx.save();
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

function setRange(next) {
  range = next;
  for (const chart of charts) chart.draw();
}

// Move the cursor to the next point (by = 1) or the one before (by = -1).
function moveCursor(plot, by) {
  const xs = plot.data[0];
  const last = xs.length - 1;
  const at = plot.cursor.idx ?? (by > 0 ? -1 : last + 1);
  const next = xs[Math.min(Math.max(at + by, 0), last)];
  plot.setCursor({ left: plot.valToPos(next, "x"), top: plot.bbox.height / devicePixelRatio / 2 });
}

function zoomBy(plot, factor) {
  const { min, max } = plot.scales.x;
  const middle = plot.cursor.idx === null ? (min + max) / 2 : plot.data[0][plot.cursor.idx];
  setRange([middle - (middle - min) * factor, middle + (max - middle) * factor]);
}

const KEYS = {
  ArrowLeft: (plot) => moveCursor(plot, -1),
  ArrowRight: (plot) => moveCursor(plot, 1),
  "+": (plot) => zoomBy(plot, 0.5),
  "-": (plot) => zoomBy(plot, 2),
  Escape: () => setRange(null),
};

// A chart of what `describe(range)` returns: `lines`, each with label, xs, values, colour and dash; `bars`: whether
// they are stacked; `marks` on the x axis, whose text is shown under the cursor or, without one, is a tick;
// `unit` of the x axis, `smoothing` from 0 to 1, and whether the y axis is logarithmic.
function chart(title, describe) {
  const hint = make("div", { className: "hint", hidden: true });
  const frame = make("figure", { className: "card chart", tabIndex: 0, ariaLabel: `${title}; arrow keys move the cursor, + and - zoom, Escape shows everything` });
  frame.append(make("figcaption", {}, title), hint);
  const hidden = new Set(); // labels of the lines that the legend has switched off
  let plot = null;

  function showHint(marks) {
    const near = marks.filter((mark) => mark.text && Math.abs(plot.valToPos(mark.x, "x") - plot.cursor.left) <= MARK_DISTANCE);
    hint.hidden = !near.length || plot.cursor.left < 0;
    hint.textContent = near.map((mark) => mark.text).join("\n");
  }

  function draw() {
    const { lines, bars, marks, unit, smoothing, log } = describe(range);
    const logarithmic = log && !bars && lines.some((line) => line.values.some((value) => value > 0));
    const series = bars ? barSeries(lines, hidden) : lines.flatMap((line) => curveSeries(line, !hidden.has(line.label), smoothing, logarithmic));
    frame.hidden = !series.length;
    if (!series.length) return;
    const before = plot?.cursor;
    plot?.destroy();
    const data = uPlot.join(series.map(({ xs, drawn }) => [xs, drawn]));
    plot = new uPlot({
      width: Math.max(frame.clientWidth - 16, 100), height: 200, series: [{ label: unit, value: (_, x) => format(x) }, ...series.map(({ options }) => options)],
      axes: [axis({ size: 28 }), axis({ size: 54, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick))) })],
      scales: {
        x: { time: false, range: (_, least, most) => range ?? (least === most ? [least - 1, most + 1] : bars ? [least - 0.5, most + 0.5] : [least, most]) },
        y: { distr: logarithmic ? 3 : 1, ...(bars && { range: (_, __, most) => [0, most * 1.05 || 1] }) },
      },
      cursor: { sync: { key: CURSOR }, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => setRange(null) }, points: { size: 6 } },
      legend: { markers: { width: 2 } },
      hooks: {
        draw: [() => drawMarks(plot, marks)],
        setCursor: [() => plot && showHint(marks)],
        setSelect: [(self) => self.select.width > 2 && setRange([self.posToVal(self.select.left, "x"), self.posToVal(self.select.left + self.select.width, "x")])],
        setSeries: [(self, index, change) => {
          if (index === null || change.show === undefined || self.series[index].class) return;
          hidden[change.show ? "delete" : "add"](self.series[index].label);
          queueMicrotask(draw);
        }],
      },
    }, data, (self, begin) => { plot = self; frame.append(self.root); begin(); });
    if (before?.left >= 0 && !before.event) plot.setCursor({ left: before.left, top: before.top });
  }

  frame.addEventListener("keydown", (event) => {
    if (!plot || !KEYS[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    KEYS[event.key](plot);
  });
  const own = { frame, draw };
  charts.add(own);
  new ResizeObserver(() => plot && frame.clientWidth && plot.setSize({ width: frame.clientWidth - 16, height: 200 })).observe(frame);
  return own;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setRange(range));
window.view.charts = { chart, setRange, isNumber };
