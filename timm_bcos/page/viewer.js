"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const { width, height, classes } = page;
const state = { asked: 0, against: null, pixel: null, rectangle: null };
const pictures = []; // {canvas, pixel, rectangle, figure}
const by = (id) => document.getElementById(id);

const WHITE = [255, 255, 255];
const FOR_AND_AGAINST = [[190, 18, 45], [24, 84, 190]];
const A_AND_B = [[196, 88, 6], [84, 48, 152]]; // orange and purple: apart for every kind of colour vision
const SATURATION = 0.995; // quantile of |contribution| at which colours are full
const OVERLAY = 0.9; // opacity of the strongest contributions over the photo

// ---- numbers -------------------------------------------------------------------------------------------------------

const isContrast = () => state.against !== null;
const askedClass = () => classes[state.asked];
const againstClass = () => classes[state.against];

/** The explained quantity: one class, or the difference of two; every sum of it is in double precision. */
function question() {
  const a = askedClass();
  if (!isContrast()) return { ...a, map: a.map, logitBias: page.logitBias };
  const b = againstClass();
  const minus = (key) => a[key] - b[key];
  return {
    map: a.map.map((value, i) => value - b.map[i]),
    logit: minus("logit"), bias: minus("bias"), constantBias: minus("constantBias"), logitBias: 0,
  };
}

function isInside({ top, bottom, left, right }, row, column) {
  return row >= top && row <= bottom && column >= left && column <= right;
}

/** Sums of a map inside and outside a rectangle, each added up by itself. */
function split(map, rectangle) {
  const sums = { inside: 0, outside: 0 };
  for (let i = 0; i < map.length; i++) {
    const part = rectangle && isInside(rectangle, Math.floor(i / width), i % width) ? "inside" : "outside";
    sums[part] += map[i];
  }
  return sums;
}

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  const at = share * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

const scaleOf = (map) => quantile(map.map(Math.abs), SATURATION) || 1e-12;

function strongest(map) {
  let best = 0;
  for (let i = 1; i < map.length; i++) if (Math.abs(map[i]) > Math.abs(map[best])) best = i;
  return { row: Math.floor(best / width), column: best % width };
}

/** Decimals that show five digits of numbers of this size. */
const decimalsFor = (size) => Math.min(12, Math.max(0, 4 - Math.floor(Math.log10(size || 1))));

function signed(value, decimals) {
  const digits = Math.abs(value).toFixed(decimals);
  return (Number(digits) === 0 ? "" : value < 0 ? "−" : "+") + digits;
}

function scientific(value) {
  if (value === 0) return "0";
  const [digits, exponent] = value.toExponential(1).split("e");
  return `${digits} × 10${[...String(Number(exponent))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

// ---- pictures ------------------------------------------------------------------------------------------------------

/** Position in a diverging scale from -1 to 1 as a colour; white is 0. */
function diverging(t, [positive, negative]) {
  const end = t < 0 ? negative : positive, strength = Math.min(1, Math.abs(t));
  return WHITE.map((white, c) => white + (end[c] - white) * strength);
}

/** A picture from a function of the pixel's index that returns [r, g, b] or [r, g, b, opacity]. */
function paint(canvas, colourAt) {
  const picture = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b, opacity = 255] = colourAt(i);
    picture.data.set([r, g, b, opacity], 4 * i);
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

const photoAt = (i) => page.photo.subarray(4 * i, 4 * i + 3);
const colourOf = (one, i) => one.colour.subarray(4 * i, 4 * i + 3);
const rowOf = (one) => (i) => [...colourOf(one, i), one.opacity[4 * i]];

function overlayOf(mapColour, strengthAt) {
  return (i) => {
    const [r, g, b] = photoAt(i), grey = 127.5 + (r + g + b) / 6, strength = OVERLAY * strengthAt(i);
    return mapColour(i).map((value) => grey * (1 - strength) + value * strength);
  };
}

/** What is drawn for the question: name, colours, and what stands below. */
function views() {
  const { map } = question(), scale = scaleOf(map), ends = isContrast() ? A_AND_B : FOR_AND_AGAINST;
  const mapColour = (i) => diverging(map[i] / scale, ends);
  const overlay = overlayOf(mapColour, (i) => Math.min(1, Math.abs(map[i]) / scale));
  const rows = (isContrast() ? [askedClass(), againstClass()] : [askedClass()]).map((one) => ({
    name: isContrast() ? `Weights for ${one.name}` : "Explanation", file: `weights ${one.name}`, colours: rowOf(one),
    below: "The colours that the network looks for, opaque where they speak for the class",
  }));
  const file = isContrast() ? `${askedClass().name} not ${againstClass().name}` : askedClass().name;
  return [
    { name: "Photo", file: "photo", colours: photoAt, below: `${width} × ${height} pixels, as the network sees it` },
    ...rows,
    { name: "Contributions", file: `contributions ${file}`, colours: mapColour, below: legend(scale, ends) },
    { name: "Overlay", file: `overlay ${file}`, colours: overlay, below: "Contributions over the photo" },
  ];
}

function legend(scale, ends) {
  const [bar, ticks, text] = ["div", "div", "div"].map((tag) => document.createElement(tag));
  const colours = [-1, 0, 1].map((t) => `rgb(${diverging(t, ends).join(" ")})`);
  bar.className = "legend";
  bar.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
  ticks.className = "ticks";
  const marks = [`−${scale.toPrecision(2)}`, "0", `+${scale.toPrecision(2)}`];
  ticks.append(...marks.map((mark) => Object.assign(document.createElement("span"), { textContent: mark })));
  text.textContent = isContrast() ? `Logits: for ${againstClass().name} ↔ for ${askedClass().name}` : "Logits: against ↔ for";
  const group = document.createElement("div");
  group.append(bar, ticks, text);
  return group;
}

function addPicture(view) {
  const figure = by("picture").content.cloneNode(true).firstElementChild;
  const canvas = Object.assign(figure.querySelector("canvas"), { width, height });
  figure.querySelector(".name").textContent = view.name;
  figure.querySelector(".below").append(view.below);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${view.name}: ${heading()}`);
  const button = figure.querySelector(".download");
  button.setAttribute("aria-label", `Download ${view.name} as PNG`);
  button.addEventListener("click", () => download(canvas, view.file));
  paint(canvas, view.colours);
  listen(figure.querySelector(".frame"));
  by("pictures").append(figure);
  pictures.push({ pixel: figure.querySelector(".pixel"), rectangle: figure.querySelector(".rectangle") });
}

function download(canvas, name) {
  const file = `${page.title} ${name}`.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  canvas.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${file}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
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
function listen(frame) {
  let start = null;
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = { ...pixelAt(event, frame), x: event.clientX, y: event.clientY, before: state.rectangle, isDrag: false };
    frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", (event) => {
    state.pixel = pixelAt(event, frame);
    if (start && Math.hypot(event.clientX - start.x, event.clientY - start.y) > 4) start.isDrag = true;
    if (start?.isDrag) state.rectangle = between(start, state.pixel);
    showNumbers();
  });
  frame.addEventListener("pointerup", (event) => {
    if (!start) return;
    state.pixel = pixelAt(event, frame);
    if (!start.isDrag) state.rectangle = null;
    start = null;
    showNumbers();
  });
  frame.addEventListener("pointercancel", () => { // the finger scrolls the page
    if (start) state.rectangle = start.before;
    start = null;
    showNumbers();
  });
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
let corner = null; // where a rectangle drawn by keys began

function onKey(event) {
  if (event.target !== event.currentTarget) return;
  const step = ARROWS[event.key];
  if (event.key === "Escape") state.rectangle = corner = null;
  else if (!step) return;
  else {
    const from = shownPixel();
    state.pixel = { row: clamp(from.row + step[0], height), column: clamp(from.column + step[1], width) };
    corner = event.shiftKey ? corner ?? from : null;
    if (corner) state.rectangle = between(corner, state.pixel);
  }
  event.preventDefault();
  showNumbers();
}

// ---- what is shown -------------------------------------------------------------------------------------------------

const shownPixel = () => state.pixel ?? strongest(question().map);

function place(element, { top, bottom, left, right }) {
  const share = (value, whole) => `${(100 * value) / whole}%`;
  Object.assign(element.style, {
    display: "block", top: share(top, height), left: share(left, width),
    height: share(bottom + 1 - top, height), width: share(right + 1 - left, width),
  });
}

function showMarks() {
  const { row, column } = shownPixel();
  for (const { pixel, rectangle } of pictures) {
    const centre = { top: `${(100 * (row + 0.5)) / height}%`, left: `${(100 * (column + 0.5)) / width}%` };
    Object.assign(pixel.style, { display: "block", ...centre });
    if (state.rectangle) place(rectangle, state.rectangle);
    else rectangle.style.display = "none";
  }
}

function showPixel() {
  const { map } = question(), { row, column } = shownPixel(), at = row * width + column;
  const note = state.pixel ? "" : ", the strongest one";
  by("place").textContent = `Row ${row}, column ${column}${note}`;
  const decimals = decimalsFor(scaleOf(map));
  Object.assign(by("contribution"), { value: map[at], textContent: signed(map[at], decimals) });
  by("swatches").replaceChildren(...(isContrast() ? [askedClass(), againstClass()] : [askedClass()]).map((one) => swatch(one, at, decimals)));
}

function swatch(one, at, decimals) {
  const line = document.createElement("div"), colour = document.createElement("i"), text = document.createElement("span");
  line.className = "swatch";
  colour.style.background = `rgb(${[...colourOf(one, at)].join(" ")})`;
  const strength = `${percent((one.strength[4 * at] / 255) ** 2)} of the strongest weights`;
  text.textContent = isContrast() ? `${one.name}: ${signed(one.map[at], decimals)}; ${strength}` : `The colour its weights look for, with ${strength}`;
  line.append(colour, text);
  return line;
}

/** Rows of the account: name, what each column's class has there, and its style. */
function accountRows(columns) {
  const sums = columns.map((one) => split(one.map, state.rectangle));
  const total = columns.map((one, i) => sums[i].inside + sums[i].outside + one.bias);
  const rest = columns.map((one) => one.bias - one.constantBias);
  const isRest = page.defects.length > 0 || rest.some((value) => value !== 0);
  const size = state.rectangle && `${state.rectangle.right + 1 - state.rectangle.left} × ${state.rectangle.bottom + 1 - state.rectangle.top}`;
  return [
    state.rectangle && ["inside", `Inside the rectangle (${size})`, sums.map((s) => s.inside)],
    ["outside", state.rectangle ? "Outside" : "All pixels", sums.map((s) => s.outside)],
    ["constants", "Constants", columns.map((one) => one.constantBias)],
    isRest && ["rest", "Added by parts that are not linear", rest],
    ["total", "Sum", total],
    ["logit", isContrast() ? "The network’s logits" : "The network’s logit", columns.map((one) => one.logit)],
  ].filter(Boolean);
}

function showAccount() {
  const whole = question();
  const columns = isContrast() ? [askedClass(), againstClass(), whole] : [whole];
  const rows = accountRows(columns), decimals = decimalsFor(Math.max(...columns.map((one) => Math.abs(one.logit))));
  const table = by("account");
  table.replaceChildren();
  if (isContrast()) {
    const head = table.createTHead().insertRow();
    head.append(...["", askedClass().name, againstClass().name, "Difference"].map((name) => heads("col", name)));
  }
  const body = table.createTBody();
  for (const [kind, name, values] of rows) {
    const row = body.insertRow();
    row.className = kind;
    row.append(heads("row", name), ...values.map((value) => cell(value, decimals)));
  }
  showRounding(whole, rows.find(([kind]) => kind === "total")[2].at(-1));
}

const heads = (scope, textContent) => Object.assign(document.createElement("th"), { scope, textContent });

function cell(value, decimals) {
  const td = document.createElement("td");
  td.append(Object.assign(document.createElement("data"), { value, textContent: signed(value, decimals) }));
  return td;
}

function showRounding(whole, total) {
  const error = Math.abs(total - whole.logit), scale = Math.abs(whole.logit - whole.logitBias);
  const relative = error === 0 ? 0 : error / scale;
  const kind = page.defects.length ? "Error" : "Rounding error";
  const hint = state.rectangle ? "" : " Drag a rectangle in a picture to split the pixels.";
  by("rounding").textContent = `${kind}: ${scientific(error)} logits (relative: ${scientific(relative)}).${hint}`;
}

function showNumbers() {
  showMarks();
  showPixel();
  showAccount();
}

function heading() {
  return isContrast() ? `why ${askedClass().name} and not ${againstClass().name}` : `why ${askedClass().name}`;
}

function showBars() {
  for (const [i, button] of [...by("bars").children].entries()) {
    button.classList.toggle("asked", i === state.asked);
    button.classList.toggle("against", i === state.against);
    button.setAttribute("aria-pressed", i === state.asked);
  }
}

function show() {
  document.body.classList.toggle("versus", isContrast());
  by("asked").value = state.asked;
  by("against").value = state.against ?? "";
  for (const option of by("against").options) option.disabled = option.value === String(state.asked);
  by("pictures").replaceChildren();
  pictures.length = 0;
  views().forEach(addPicture);
  showBars();
  showNumbers();
}

// ---- start ---------------------------------------------------------------------------------------------------------

function ask(asked, against) {
  state.asked = asked;
  state.against = against === asked ? null : against;
  show();
}

function addBar(one, index) {
  const button = document.createElement("button");
  button.type = "button";
  const [name, track, fill, share] = ["name", "track", "fill", "share"].map((className) => Object.assign(document.createElement("span"), { className }));
  name.textContent = button.title = one.name;
  fill.style.width = `${100 * one.probability}%`;
  share.textContent = percent(one.probability);
  track.append(fill);
  button.append(name, track, share);
  button.addEventListener("click", () => ask(index, state.against));
  by("bars").append(button);
}

function addOptions() {
  const options = classes.map((one, i) => new Option(one.name, i));
  by("asked").append(...options);
  by("against").append(new Option("and not …", ""), ...classes.map((one, i) => new Option(`and not ${one.name}`, i)));
  by("against").hidden = classes.length < 2;
  by("asked").addEventListener("change", (event) => ask(Number(event.target.value), state.against));
  by("against").addEventListener("change", (event) => ask(state.asked, event.target.value === "" ? null : Number(event.target.value)));
}

function showFacts() {
  const shown = classes.length < page.classCount ? `${classes.length} of ${page.classCount} classes` : "All classes";
  const law = page.probability === "softmax" ? "softmax" : "sigmoid, so they need not add up to 100 %";
  by("kind").textContent = `${shown}, probabilities by ${law}`;
  by("defects").hidden = by("promise").hidden = false;
  by("defects").hidden = page.defects.length === 0;
  by("promise").hidden = page.defects.length > 0;
  by("defects").querySelector("ul").append(...page.defects.map((textContent) => Object.assign(document.createElement("li"), { textContent })));
  document.body.classList.toggle("coarse", width < 100);
}

/** The bytes of a PNG, red, green, blue and opacity of each pixel; grey pictures have them all in red. */
async function decode(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, width, height).data;
}

function decodeNumbers(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Float64Array.from(new Float32Array(bytes.buffer));
}

async function load() {
  page.photo = await decode(page.photo);
  for (const one of classes) {
    one.map = decodeNumbers(one.contributions);
    for (const key of ["colour", "opacity", "strength"]) one[key] = await decode(one[key]);
  }
}

/** Whoever embeds the page hears how high it is: a sandboxed frame cannot set its own height. */
function tellHeight() {
  if (window.parent === window) return;
  const tell = () => window.parent.postMessage({ height: Math.ceil(document.documentElement.getBoundingClientRect().height) }, "*");
  new ResizeObserver(tell).observe(document.documentElement);
}

async function start() {
  await load();
  addOptions();
  classes.forEach(addBar);
  showFacts();
  by("pictures").addEventListener("keydown", onKey);
  show();
  tellHeight();
  document.documentElement.dataset.ready = "true";
}

start();
