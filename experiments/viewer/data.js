'use strict';
// ---- data ---------------------------------------------------------------------------------------
const $ = id => document.getElementById(id);
const D = JSON.parse($('data').textContent);
const {E, K, C, layers, labels} = D, T = labels.length, L = layers.length;

function unpack(base64, Kind) {
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const size = Kind.BYTES_PER_ELEMENT, read = size == 2 ? 'getUint16' : 'getFloat32';
  return Kind.from({length: bytes.length / size}, (_, i) => view[read](i * size, true));
}
const experts = unpack(D.experts, Uint16Array), weights = unpack(D.weights, Float32Array);
let largest = 1e-30;
for (const w of weights) largest = Math.max(largest, Math.abs(w));
const strength = w => Math.abs(w) / largest;
// Where the K choices of token t begin, in layer number l of those that choose, iteration c.
const at = (l, c, t) => ((l * C + c) * T + t) * K;
// Which of its choices is expert e; -1 if none.
function rankOf(l, c, t, e) {
  for (let k = 0, i = at(l, c, t); k < K; k++) if (experts[i + k] == e) return k;
  return -1;
}
function tokensOf(l, c, e) {
  const found = [];
  for (let t = 0; t < T; t++) if (rankOf(l, c, t, e) >= 0) found.push(t);
  return found;
}

// ---- words --------------------------------------------------------------------------------------
const many = n => n.toLocaleString('en');
const plural = (n, word) => `${many(n)} ${word}${n == 1 ? '' : 's'}`;
const percent = x => (100 * x).toFixed(1) + ' %';
const short = w => Math.abs(w) < 1 ? w.toFixed(2).replace('0.', '.') : w.toPrecision(3);
const isSpecial = label => /^<[|\uff5c].*[|\uff5c]>$/.test(label);
const callName = (l, c) => `layer ${layers[l]}, iteration ${c}`;
// A token as one line: marks for what cannot be seen.
function visible(label) {
  if (isSpecial(label)) return '◆';
  return label == '' ? '‥' : label.replace(/ /g, '·').replace(/\n/g, '↵').replace(/\t/g, '→');
}
const quoted = t => isSpecial(labels[t]) ? labels[t] : `“${visible(labels[t])}”`;

function element(tag, text, className) {
  const x = document.createElement(tag);
  if (text !== undefined) x.textContent = text;
  if (className) x.className = className;
  return x;
}
const hue = c => `var(--i${c % 4})`;
function options(select, entries) {
  entries.forEach(([value, text]) => select.add(new Option(text, value)));
}

// ---- what is chosen -----------------------------------------------------------------------------
// hover is a token that is only pointed at; step is a place in the chain, (l * C + c) * K + k.
const state = {token: 0, hover: -1, step: -1, show: -1, l: 0, e: experts[0],
               first: 0, second: L * C > 1 ? 1 : 0, row: 0, column: 0};

const inside = (x, n, otherwise) => Number.isInteger(x) && x >= 0 && x < n ? x : otherwise;
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const take = (name, n) => {
    const text = asked.get(name);
    if (text !== null) state[name] = inside(text == '' ? -1 : +text, n, state[name]);
  };
  state.show = -1;
  take('token', T), take('l', L), take('e', E), take('first', L * C), take('second', L * C);
  take('show', L);
  if (asked.get('e') == 'none') state.e = -1;
}
let writing = 0;
function writeAddress() {
  clearTimeout(writing);
  writing = setTimeout(() => {
    const {token, l, e, first, second, show} = state;
    const said = {token, l, e: e < 0 ? 'none' : e, first, second, ...(show >= 0 && {show})};
    history.replaceState(null, '', '#' + new URLSearchParams(said));
  }, 200);
}
