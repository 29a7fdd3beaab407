// Charts as SVG: lines with alarms and phases, and intervals. The pointer, or a finger, reads the values of a step.

const WIDTH = 360, HEIGHT = 190, LEFT = 46, RIGHT = 10, TOP = 12, BOTTOM = 24;
// Colours in report.css: classes s0, s1, ... From the eleventh series on, a dash pattern tells equal colours apart.
const COLOURS = 10;

function look(index) {
  const dash = Math.floor(index / COLOURS);
  return `s${index % COLOURS}` + (dash ? ` d${dash}` : "");
}

// About `count` round numbers from at or below `low` to at or above `high`.
function ticks(low, high, count) {
  if (high - low < 1e-12) {
    const pad = Math.abs(high) * 0.1 || 0.5;
    [low, high] = [low - pad, high + pad];
  }
  const raw = (high - low) / count, magnitude = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * magnitude).find((one) => one >= raw * (1 - 1e-9));
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, at) => Number(((first + at) * step).toPrecision(12)));
}

function scale(low, high, toLow, toHigh) {
  const span = high - low || 1;
  return (value) => toLow + (value - low) / span * (toHigh - toLow);
}

// The frame of a chart: the svg with its grid and ticks. `xTicks` are [position, text].
function frame(title, width, yTicks, yOf, xTicks) {
  return el("svg:svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": title },
    yTicks.map((tick) => [
      el("svg:path", { class: "grid", d: `M${LEFT} ${yOf(tick)}H${width - RIGHT}` }),
      el("svg:text", { class: "tick end", x: LEFT - 6, y: yOf(tick), dy: "3.5" }, number(tick))]),
    xTicks.map(([x, text]) => el("svg:text", { class: "tick mid", x, y: HEIGHT - 6 }, text)));
}

function figure(title, keys, svg, wide) {
  return el("figure", { class: wide ? "wide" : "" },
    el("figcaption", {}, el("strong", {}, title), el("span", { class: "legend" }, keys)), svg);
}

// The scales and ticks of a line chart.
function axes(chart) {
  const least = (values) => values.reduce((a, b) => Math.min(a, b));
  const most = (values) => values.reduce((a, b) => Math.max(a, b));
  const points = chart.series.flatMap((one) => one.points);
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const low = least(xs), high = most(xs), top = most(ys);
  const base = chart.zero ? Math.min(0, least(ys)) : least(ys);
  const yTicks = ticks(base, chart.zero && base === 0 && top === 0 ? 1 : top, 4);
  const xOf = scale(low, high, LEFT, WIDTH - RIGHT), yOf = scale(yTicks[0], yTicks.at(-1), HEIGHT - BOTTOM, TOP);
  const whole = ticks(low, high, 5).filter((tick) => tick >= low && tick <= high && Number.isInteger(tick));
  return { low, high, xOf, yOf, yTicks, xTicks: whole.map((tick) => [xOf(tick), number(tick)]) };
}

// One chart of a stage; `marks` are the stage's alarms and phases.
function lineChart(chart, marks) {
  const { low, high, xOf, yOf, yTicks, xTicks } = axes(chart);
  const svg = frame(`${chart.title} by step`, WIDTH, yTicks, yOf, xTicks);
  for (const mark of marks.filter((one) => one.x >= low && one.x <= high)) {
    const x = xOf(mark.x), line = el("svg:path", { class: mark.kind, d: `M${x} ${TOP}V${HEIGHT - BOTTOM}` });
    const flag = mark.kind === "alarm" && el("svg:path", { class: "flag", d: `M${x - 4} ${TOP - 8}h8l-4 8z` });
    svg.append(el("svg:g", {}, el("svg:title", {}, mark.label), line, flag));
  }
  const values = chart.series.map(() => el("b"));
  const key = (one, at) => el("span", { class: `key ${look(one.look)}`, title: one.key }, `${one.label} `, values[at]);
  for (const one of chart.series) {
    const points = one.points.map(([x, y]) => `${xOf(x).toFixed(1)},${yOf(y).toFixed(1)}`).join(" ");
    const [x, y] = one.points.at(-1);
    svg.append(el("svg:polyline", { class: `line ${look(one.look)}`, points }),
      el("svg:circle", { class: `dot ${look(one.look)}`, cx: xOf(x), cy: yOf(y), r: 3 }));
  }
  read(svg, chart.series, values, xOf);
  return figure(chart.title, chart.series.map(key), svg);
}

// Show the last values, and under the pointer those of the nearest step.
function read(svg, series, values, xOf) {
  const cross = el("svg:path", { class: "cross" }), step = el("svg:text", { class: "tick mid", y: TOP - 3 });
  const rest = () => {
    series.forEach((one, at) => { values[at].textContent = number(one.points.at(-1)[1]); });
    cross.setAttribute("d", "");
    step.textContent = "";
  };
  const closest = (points, x) =>
    points.reduce((a, b) => (Math.abs(xOf(b[0]) - x) < Math.abs(xOf(a[0]) - x) ? b : a));
  svg.append(cross, step);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * WIDTH;
    const found = series.map((one) => closest(one.points, x)), at = closest(found, x)[0];
    found.forEach((point, place) => { values[place].textContent = point[0] === at ? number(point[1]) : "\u2013"; });
    cross.setAttribute("d", `M${xOf(at)} ${TOP}V${HEIGHT - BOTTOM}`);
    step.setAttribute("x", Math.max(LEFT + 16, Math.min(WIDTH - 30, xOf(at))));
    step.textContent = `step ${number(at)}`;
  });
  svg.addEventListener("pointerleave", rest);
  rest();
}

// Shares in [0, 1] with their intervals: `series` is [[name, [[share, low, high] or null per label]]].
function intervalChart(title, labels, series) {
  const width = Math.max(860, 96 * labels.length + LEFT + RIGHT), step = (width - LEFT - RIGHT) / labels.length;
  const yOf = scale(0, 1, HEIGHT - BOTTOM, TOP), middle = (at) => LEFT + step * (at + 0.5);
  const svg = frame(title, width, [0, 0.25, 0.5, 0.75, 1], yOf, labels.map((label, at) => [middle(at), label]));
  series.forEach(([name, values], place) => {
    const x = (at) => middle(at) + 9 * (place - (series.length - 1) / 2), css = look(place);
    const known = values.map((value, at) => [value, at]).filter(([value]) => value);
    const points = known.map(([value, at]) => `${x(at)},${yOf(value[0])}`).join(" ");
    svg.append(el("svg:polyline", { class: `line faint ${css}`, points }));
    for (const [[share, low, high], at] of known) {
      const hint = `${labels[at]}, ${name}: ${share.toFixed(3)} [${low.toFixed(3)}, ${high.toFixed(3)}]`;
      svg.append(el("svg:g", {}, el("svg:title", {}, hint),
        el("svg:path", { class: `line ${css}`, d: `M${x(at)} ${yOf(low)}V${yOf(high)}` }),
        el("svg:circle", { class: `dot ${css}`, cx: x(at), cy: yOf(share), r: 4 })));
    }
  });
  svg.setAttribute("class", "scrolls");
  const keys = series.map(([name], at) => el("span", { class: `key ${look(at)}` }, name));
  return figure(title, keys, el("div", { class: "scroll" }, svg), true);
}
