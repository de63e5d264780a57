// The viewer: the selected classes, the pointer, and everything shown for them.

const page = JSON.parse(document.getElementById("data").textContent);
const { width, height, classes } = page;
const state = { target: 0, against: null, scale: 1, pixel: null, rectangle: null, isDragging: false, active: null };
const pictures = []; // the marks on each: {pixel, rectangle, tip}
let current; // the explained quantity, see `explained`
const by = (id) => document.getElementById(id);
const create = (tag) => document.createElement(tag);
const element = (tag, className = "", textContent = "") => Object.assign(create(tag), { className, textContent });

const isContrast = () => state.against !== null;
const targetClass = () => classes[state.target];
const againstClass = () => classes[state.against]; // undefined where one class is explained
const shownClasses = () => (isContrast() ? [targetClass(), againstClass()] : [targetClass()]);

// ---- pictures ------------------------------------------------------------------------------------------------------

function addPicture(view) {
  const figure = by("picture").content.cloneNode(true).firstElementChild;
  const canvas = Object.assign(figure.querySelector("canvas"), { width, height });
  figure.querySelector(".title").textContent = view.title;
  figure.querySelector(".below").append(view.below);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${view.title}: ${heading()}`);
  const button = figure.querySelector(".download");
  button.setAttribute("aria-label", `Download ${view.title} as PNG`);
  button.addEventListener("click", () => download(canvas, view.file));
  paint(canvas, view.colors);
  listen(figure.querySelector(".frame"), pictures.length);
  by("pictures").append(figure);
  const [pixel, rectangle, tip] = [".pixel", ".rectangle", ".tip"].map((name) => figure.querySelector(name));
  pictures.push({ pixel, rectangle, tip });
}

// ---- pointing ------------------------------------------------------------------------------------------------------

const clamp = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value)));

function pixelAt(event, frame) {
  const box = frame.getBoundingClientRect();
  return {
    row: clamp(((event.clientY - box.top) / box.height) * height, height),
    column: clamp(((event.clientX - box.left) / box.width) * width, width),
  };
}

function between(p, q) {
  return {
    top: Math.min(p.row, q.row), bottom: Math.max(p.row, q.row),
    left: Math.min(p.column, q.column), right: Math.max(p.column, q.column),
  };
}

/** Pointing shows a pixel, dragging draws a rectangle, a click removes it. */
function listen(frame, number) {
  let start = null;
  const on = (name, action) => frame.addEventListener(name, (event) => { action(event); showNumbers(); });
  const stop = () => { start = null; state.isDragging = false; };
  on("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = { ...pixelAt(event, frame), x: event.clientX, y: event.clientY, before: state.rectangle };
    frame.setPointerCapture(event.pointerId);
  });
  on("pointermove", (event) => {
    Object.assign(state, { pixel: pixelAt(event, frame), active: number });
    state.isDragging ||= start !== null && Math.hypot(event.clientX - start.x, event.clientY - start.y) > 4;
    if (state.isDragging) state.rectangle = between(start, state.pixel);
  });
  on("pointerup", (event) => {
    if (start === null) return;
    Object.assign(state, { pixel: pixelAt(event, frame), active: number });
    if (!state.isDragging) state.rectangle = null;
    stop();
  });
  on("pointercancel", () => { // the finger scrolls the page
    if (start !== null) state.rectangle = start.before;
    stop();
  });
  on("pointerleave", (event) => { if (event.pointerType === "mouse") state.active = null; });
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
let corner = null; // first corner of a rectangle that is drawn with the keyboard

function onKey(event) {
  if (event.target !== event.currentTarget) return;
  const step = ARROWS[event.key];
  if (event.key === "Escape") state.rectangle = corner = null;
  else if (!step) return;
  else {
    const from = shownPixel();
    const length = event.shiftKey ? 1 : state.scale;
    state.pixel = { row: clamp(from.row + length * step[0], height), column: clamp(from.column + length * step[1], width) };
    corner = event.shiftKey ? corner ?? from : null;
    if (corner) state.rectangle = between(corner, state.pixel);
  }
  event.preventDefault();
  showNumbers();
}

// ---- numbers ------------------------------------------------------------------------------------------------------

const shownPixel = () => state.pixel ?? current.strongest;

/** Where a rectangle of pixels lies in a picture. */
function place(mark, { top, bottom, left, right }) {
  const share = (value, whole) => `${(100 * value) / whole}%`;
  Object.assign(mark.style, {
    display: "block", top: share(top, height), left: share(left, width),
    height: share(bottom + 1 - top, height), width: share(right + 1 - left, width),
  });
}

function showMarks() {
  const { row, column } = shownPixel();
  const top = `${(100 * (row + 0.5)) / height}%`, left = `${(100 * (column + 0.5)) / width}%`;
  pictures.forEach(({ pixel, rectangle, tip }, i) => {
    pixel.classList.toggle("cell", state.scale > 1);
    if (state.scale > 1) place(pixel, cellAround({ row, column }));
    else Object.assign(pixel.style, { display: "block", top, left, width: "", height: "" });
    if (state.rectangle) place(rectangle, state.rectangle);
    else rectangle.style.display = "none";
    tip.hidden = i !== state.active;
    if (!tip.hidden) showTip(tip, row, column);
  });
}

/** The number beside the pointer: the contribution of the cell, or the rectangle's sum while it is drawn. */
function showTip(tip, row, column) {
  const { map, cells, decimals } = current;
  const sum = () => `Σ ${signed(split(map, state.rectangle).inside, decimalsFor(current.logit, 5))}`;
  tip.textContent = state.isDragging ? sum() : signed(cells[cellOf(row, column)], decimals);
  tip.classList.toggle("low", row < height / 4);
  const share = (100 * (column + 0.5)) / width;
  Object.assign(tip.style, { top: `${(100 * (row + 0.5)) / height}%`, left: `${Math.min(82, Math.max(18, share))}%` });
}

function showPixel() {
  const { cells, decimals } = current, { row, column } = shownPixel(), cell = cellOf(row, column);
  const where = state.scale > 1 ? placeOfCell(cellAround({ row, column })) : `Row ${row}, column ${column}`;
  by("pixel-title").textContent = state.scale > 1 ? "Cell" : "Pixel";
  by("place").textContent = `${where}${state.pixel ? "" : " (the strongest)"}`;
  Object.assign(by("contribution"), { value: cells[cell], textContent: signed(cells[cell], decimals) });
  const parts = state.scale > 1 ? (isContrast() ? shownClasses().map((one) => cellLine(one, cell)) : [])
    : shownClasses().map((one) => swatch(one, row * width + column));
  by("swatches").replaceChildren(...parts);
}

const placeOfCell = ({ top, bottom, left, right }) => `Rows ${top} to ${bottom}, columns ${left} to ${right}`;

/** A class's contribution of a cell, whose pixels have different colors. */
function cellLine(one, cell) {
  return element("div", "", `${one.name} ${signed(cellSums(one.map)[cell], current.decimals)}`);
}

function swatch(one, at) {
  const line = element("div", "swatch"), color = element("i");
  color.style.background = `rgb(${[...colorOf(one, at)].join(" ")})`;
  const what = isContrast() ? `${one.name} ${signed(one.map[at], current.decimals)}` : "Color of its weights";
  const text = element("div", "", what);
  text.append(element("span", "note", `Norm: ${percent((one.strength[4 * at] / 255) ** 2)} of the largest`));
  line.append(color, text);
  return line;
}

/** Rows of the table of sums: kind, name, and the number of each column. */
function sumRows(columns) {
  const sums = columns.map((one) => split(one.map, state.rectangle));
  const rest = columns.map((one) => one.bias - one.constantBias);
  const isRest = page.violations.length > 0 || rest.some((value) => value !== 0);
  return [
    state.rectangle && ["inside", `Inside, ${sizeOf(state.rectangle)}`, sums.map(({ inside }) => inside)],
    ["outside", state.rectangle ? "Outside" : "All pixels", sums.map(({ outside }) => outside)],
    ["constants", "Constants", columns.map((one) => one.constantBias)],
    isRest && ["rest", "Nonlinear parts", rest],
    ["total", "Sum", columns.map((one, i) => sums[i].inside + sums[i].outside + one.bias)],
    ["logit", "Model’s logit", columns.map((one) => one.logit)],
  ].filter(Boolean);
}

const sizeOf = ({ top, bottom, left, right }) => `${right + 1 - left}\u00a0×\u00a0${bottom + 1 - top}`;

function showSums() {
  const columns = isContrast() ? [...shownClasses(), current] : [current];
  const rows = sumRows(columns), largest = Math.max(...columns.map((one) => Math.abs(one.logit)));
  const decimals = decimalsFor(largest, 5);
  const table = by("sums"), head = table.createTHead(), body = element("tbody");
  const names = isContrast() ? ["", targetClass().name, againstClass().name, "Difference"] : [];
  head.replaceChildren(...names.map((name) => header("col", name)));
  for (const [kind, name, values] of rows) {
    const row = Object.assign(body.insertRow(), { className: kind });
    row.append(header("row", name), ...values.map((value) => cell(value, decimals)));
  }
  table.replaceChildren(head, body);
  showRounding(rows.find(([kind]) => kind === "total")[2].at(-1));
}

const header = (scope, name) => Object.assign(element("th", "", name), { scope, title: name });

function cell(value, decimals) {
  const td = element("td");
  td.append(Object.assign(element("data", "", signed(value, decimals)), { value }));
  return td;
}

function showRounding(total) {
  const error = Math.abs(total - current.logit), scale = Math.abs(current.logit - current.logitBias);
  const relative = error === 0 ? 0 : error / scale;
  const kind = page.violations.length ? "Error" : "Rounding error";
  const hint = state.rectangle ? "" : " Drag a rectangle in a picture to split the pixels.";
  by("rounding").textContent = `${kind}: ${scientific(error)} logits (relative: ${scientific(relative)}).${hint}`;
}

function showNumbers() {
  showMarks();
  showPixel();
  showSums();
}

const heading = () => `why ${shownClasses().map((one) => one.name).join(" and not ")}`;

function showBars() {
  for (const [i, button] of [...by("bars").children].entries()) {
    button.classList.toggle("target", i === state.target);
    button.classList.toggle("against", i === state.against);
    button.setAttribute("aria-pressed", i === state.target);
  }
}

function show() {
  current = explained();
  document.body.classList.toggle("versus", isContrast());
  by("target").value = state.target;
  by("against").value = state.against ?? "";
  for (const option of by("against").options) option.disabled = option.value === String(state.target);
  by("pictures").replaceChildren();
  pictures.length = 0;
  views().forEach(addPicture);
  showBars();
  showNumbers();
}

// ---- start ---------------------------------------------------------------------------------------------------------

function select(target, against) {
  state.target = target;
  state.against = against === target ? null : against;
  show();
}

function addBar(one, index) {
  const button = Object.assign(element("button"), { type: "button" });
  const [name, track, fill, share] = ["name", "track", "fill", "share"].map((part) => element("span", part));
  name.textContent = button.title = one.name;
  fill.style.width = `${100 * one.probability}%`;
  share.textContent = percent(one.probability);
  track.append(fill);
  button.append(name, track, share);
  button.addEventListener("click", () => select(index, state.against));
  by("bars").append(button);
}

function addOptions() {
  const options = classes.map((one, i) => new Option(one.name, i));
  by("target").append(...options);
  by("against").append(new Option("and not …", ""), ...classes.map((one, i) => new Option(`and not ${one.name}`, i)));
  by("against").hidden = classes.length < 2;
  const chosen = (id) => (by(id).value === "" ? null : Number(by(id).value));
  const onChange = () => select(chosen("target"), chosen("against"));
  for (const id of ["target", "against"]) by(id).addEventListener("change", onChange);
}

function addScales() {
  const slider = by("scale");
  slider.max = page.scales.length - 1;
  slider.value = page.scales.indexOf(page.scale);
  const onChange = () => {
    state.scale = page.scales[Number(slider.value)];
    by("cells").textContent = state.scale > 1 ? `${state.scale} × ${state.scale} pixels` : "single pixels";
    slider.setAttribute("aria-valuetext", by("cells").textContent);
  };
  slider.addEventListener("input", () => { onChange(); show(); });
  onChange();
}

function showNotes() {
  const shown = classes.length < page.classCount ? `${classes.length} of ${page.classCount} classes` : "All classes";
  const kind = page.probability === "softmax" ? "softmax" : "sigmoid, so they need not add up to 100 %";
  by("kind").textContent = `${shown}, probabilities by ${kind}`;
  by("violations").hidden = page.violations.length === 0;
  by("promise").hidden = page.violations.length > 0;
  by("violations").querySelector("ul").append(...page.violations.map((violation) => element("li", "", violation)));
  document.body.classList.toggle("coarse", width < 100);
}

async function load() {
  page.photo = await decode(page.photo);
  for (const one of classes) {
    one.map = decodeNumbers(one.contributions);
    for (const key of ["color", "opacity", "strength"]) one[key] = await decode(one[key]);
  }
}

/** Post the height to the embedding page: a sandboxed frame cannot set its own height. */
function postHeight() {
  if (window.parent === window) return;
  const post = () => window.parent.postMessage({ height: Math.ceil(document.documentElement.getBoundingClientRect().height) }, "*");
  new ResizeObserver(post).observe(document.documentElement);
}

async function start() {
  await load();
  addOptions();
  addScales();
  classes.forEach(addBar);
  showNotes();
  state.against = page.against;
  by("pictures").addEventListener("keydown", onKey);
  show();
  postHeight();
  document.documentElement.dataset.ready = "true";
}

start();
