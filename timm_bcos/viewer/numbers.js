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
  const scale = quantile(whole.map.map(Math.abs), SATURATION) || 1e-12;
  return { ...whole, scale, decimals: decimalsFor(scale, 4), strongest: strongest(whole.map) };
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

function strongest(map) {
  let best = 0;
  for (let i = 1; i < map.length; i++) if (Math.abs(map[i]) > Math.abs(map[best])) best = i;
  return { row: Math.floor(best / width), column: best % width };
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
