"use strict";

// Sums of contributions in double precision, and the format of numbers.

const SATURATION = 0.995; // quantile of |contribution| at which colors are full

/** The explained quantity: one class, or the difference of two, in double precision. */
function explained() {
  const a = targetClass(), b = againstClass(), minus = (key) => a[key] - b[key];
  const whole = !b ? { ...a, logitBias: page.logitBias } : {
    map: a.map.map((value, i) => value - b.map[i]),
    logit: minus("logit"), bias: minus("bias"), constantBias: minus("constantBias"), logitBias: 0,
  };
  const cells = cellSums(whole.map), full = quantile(cells.map(Math.abs), SATURATION) || 1e-12;
  return { ...whole, cells, full, decimals: decimalsFor(full, 4), strongest: strongest(cells) };
}

const cellsPerRow = () => Math.ceil(width / state.scale);
const cellOf = (row, column) => Math.floor(row / state.scale) * cellsPerRow() + Math.floor(column / state.scale);
const cellAt = (i) => cellOf(Math.floor(i / width), i % width);

/** Sums of a map over cells of scale × scale pixels, counted from the top left. */
function cellSums(map) {
  const sums = new Float64Array(cellsPerRow() * Math.ceil(height / state.scale));
  for (let i = 0; i < map.length; i++) sums[cellAt(i)] += map[i];
  return sums;
}

/** The pixels of the cell around a pixel. */
function cellAround({ row, column }) {
  const top = row - (row % state.scale), left = column - (column % state.scale);
  return {
    top, left,
    bottom: Math.min(top + state.scale, height) - 1, right: Math.min(left + state.scale, width) - 1,
  };
}

function isInside({ top, bottom, left, right }, row, column) {
  return row >= top && row <= bottom && column >= left && column <= right;
}

/** Sums of a map inside and outside a rectangle. */
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

/** The first pixel of the strongest cell. */
function strongest(cells) {
  let best = 0;
  for (let i = 1; i < cells.length; i++) if (Math.abs(cells[i]) > Math.abs(cells[best])) best = i;
  return { row: Math.floor(best / cellsPerRow()) * state.scale, column: (best % cellsPerRow()) * state.scale };
}

/** Number of decimals that show `digits` significant digits of a number of this size. */
function decimalsFor(size, digits) {
  const order = Math.floor(Math.log10(Math.abs(size) || 1));
  return Math.min(12, Math.max(0, digits - 1 - order));
}

function signed(value, decimals) {
  const digits = Math.abs(value).toFixed(decimals);
  return (Number(digits) === 0 ? "" : value < 0 ? "−" : "+") + digits;
}

function scientific(value) {
  if (value === 0 || !Number.isFinite(value)) return value === 0 ? "0" : "∞";
  const [digits, exponent] = value.toExponential(1).split("e");
  const raised = [...String(Number(exponent))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  return `${digits} × 10${raised.join("")}`;
}

const percent = (share) => `${share > 0 && share < 0.0005 ? "< 0.1" : (100 * share).toFixed(1)}\u00a0%`;

function decodeNumbers(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Float64Array.from(new Float32Array(bytes.buffer));
}
