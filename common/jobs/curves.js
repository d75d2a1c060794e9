// Curves of a training: a pane for each term of the loss, the held-out loss beside the loss, on a scale of their own.
const SVG = "http://www.w3.org/2000/svg", POINTS = 400, LEFT = 62, RIGHT = 12, TOP = 12, BOTTOM = 34, HEIGHT = 220;
const NO_TERMS = ["step", "max_steps", "time", "epoch", "learning_rate", "grad_norm"];
let points = [];

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function number(value) {
  if (value === null) return "not a number";
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : value.toFixed(4);
}

function tickText(value) {
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e5) ? value.toExponential(0) : String(Number(value.toPrecision(3)));
}

// About `most` round numbers from low to high; of a log scale 1, 2 and 5 times powers of ten, or powers alone.
function ticks(low, high, most, log = false) {
  if (log) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const of = parts => Array.from({length: last - first + 1}, (_, i) => parts.map(part => part * 10 ** (first + i))).flat()
      .filter(value => value >= low / 1.001 && value <= high * 1.001);
    const fine = of([1, 2, 5]);
    if (fine.length < 2) return ticks(low, high, most);
    if (fine.length <= most + 2) return fine;
    const powers = of([1]), thin = Math.ceil(powers.length / most);
    return powers.filter((_, i) => i % thin === 0);
  }
  if (!(high > low)) return [low];
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(part => part * power >= rough) * power;
  const made = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) made.push(value);
  return made;
}

function span(list) {
  return list.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// One pane: lines [{name, points: [[step, value]], held}] in the same units.
function pane(title, lines, wantsLog, width) {
  const every = lines.flatMap(line => line.points), [x0, x1] = span(every.map(p => p[0]));
  let [y0, y1] = span(every.map(p => p[1]));
  const log = wantsLog && y0 > 0 && y1 > y0;
  if (!(y1 > y0)) { const room = Math.abs(y0) * .1 || 1; y0 -= room; y1 += room; }
  const scale = log ? Math.log10 : value => value;
  const x = step => LEFT + (width - LEFT - RIGHT) * (x1 > x0 ? (step - x0) / (x1 - x0) : .5);
  const y = value => TOP + (HEIGHT - TOP - BOTTOM) * (scale(y1) - scale(value)) / (scale(y1) - scale(y0));
  const said = lines.map(line => line.name + " " + number(line.points.at(-1)[1])).join(", ");
  const drawing = svg("svg", {viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Curve to step ${x1}: ${said}`});
  for (const value of ticks(y0, y1, 5, log)) drawing.append(
    svg("line", {class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)}),
    svg("text", {x: LEFT - 8, y: y(value) + 4, "text-anchor": "end"}, tickText(value)));
  const across = ticks(x0, x1, width < 400 ? 3 : 5).filter(Number.isInteger);
  for (const step of across.length ? across : [x0]) drawing.append(
    svg("line", {class: "axis", x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM}),
    svg("text", {x: x(step), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle"}, step.toLocaleString("en")));
  drawing.append(svg("text", {x: width - RIGHT, y: HEIGHT - 2, "text-anchor": "end"}, "step"));
  for (const line of lines) {
    const thin = Math.ceil(line.points.length / POINTS);
    const shown = line.points.filter((_, i) => i % thin === 0 || i === line.points.length - 1);
    drawing.append(svg("polyline", {class: line.held ? "held" : "", points: shown.map(p => x(p[0]).toFixed(1) + "," + y(p[1]).toFixed(1)).join(" ")}));
    if (shown.length <= 20) for (const p of shown) drawing.append(svg("circle", {class: line.held ? "held" : "", cx: x(p[0]), cy: y(p[1]), r: 2.5}));
  }
  const legend = lines.map(line => element("span", {class: line.held ? "held" : ""}, line.name + " " + number(line.points.at(-1)[1])));
  return element("figure", {}, element("figcaption", {}, element("b", {}, title + (log ? ", log scale" : "")), ...legend), drawing);
}

function showCurves() {
  const names = [...new Set(points.flatMap(Object.keys))].filter(name => !NO_TERMS.includes(name)
    && (name === "eval_loss" || !name.startsWith("eval_")));
  const line = name => ({name: name === "eval_loss" ? "held-out loss" : name.replaceAll("_", " "), held: name === "eval_loss",
    points: points.filter(point => typeof point[name] === "number").map(point => [point.step, point[name]])});
  const panes = names.filter(name => name !== "eval_loss" || !names.includes("loss")).map(name =>
    [name.replaceAll("_", " "), (name === "loss" && names.includes("eval_loss") ? [name, "eval_loss"] : [name]).map(line)
      .filter(each => each.points.length)]).filter(([, lines]) => lines.length);
  $("curves").hidden = !panes.length;
  const room = $("detail").clientWidth, width = Math.max(280, Math.min(560, room < 700 ? room - 40 : (room - 60) / 2));
  $("panes").replaceChildren(...panes.map(([title, lines]) => pane(title, lines, $("log-scale").checked, width)));
}
