// ---- the chart ----------------------------------------------------------------------------------
// A canvas as large as what can be seen of the chart stays in place while its frame scrolls, and
// draws the columns that are in sight: the number of tokens costs nothing.
const GUTTER = 92, HEAD = 34, GAP = 5, LAYER_GAP = 18;
const roll = $('roll'), canvas = $('canvas'), pen = canvas.getContext('2d');
const mono = getComputedStyle(document.documentElement).getPropertyValue('--mono');
let lane = 3, left = new Float64Array(T + 1), colours = {};
const shown = () => state.show < 0 ? layers.map((_, l) => l) : [state.show];
const bandHeight = () => E * lane;
const layerHeight = () => C * bandHeight() + (C - 1) * GAP + LAYER_GAP;
const bandTop = (l, c) => HEAD + 8 + shown().indexOf(l) * layerHeight() + c * (bandHeight() + GAP);

function layOut() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ['paper', 'ink', 'faint', 'rule', 'band', 'hover', 'i0', 'i1', 'i2', 'i3'])
    colours[name] = style.getPropertyValue('--' + name).trim();
  const n = shown().length, room = Math.max(360, innerHeight - 250);
  const fixed = HEAD + n * ((C - 1) * GAP + LAYER_GAP);
  lane = Math.max(2, Math.min(8, Math.floor((room - fixed) / (n * C * E))));
  pen.font = '13px ' + mono;
  for (let t = 0; t < T; t++) {
    const {width} = pen.measureText(visible(labels[t]));
    left[t + 1] = Math.min(160, Math.max(13, Math.ceil(width) + 6));
  }
  const total = left.reduce((a, b) => a + b, 0) - left[0], wide = roll.clientWidth - GUTTER;
  const stretch = Math.max(1, Math.min(2, wide / total));
  left[0] = 0;
  for (let t = 0; t < T; t++) left[t + 1] = left[t] + left[t + 1] * stretch;
  const height = HEAD + n * layerHeight();
  $('sizer').style.width = Math.floor(GUTTER + left[T]) + 'px';
  $('sizer').style.height = height + 'px';
  roll.style.height = Math.min(height, room) + 16 + 'px';
  $('chain').style.maxHeight = Math.max(560, $('chain').previousElementSibling.offsetHeight) + 'px';
  canvas.width = roll.clientWidth * devicePixelRatio;
  canvas.height = roll.clientHeight * devicePixelRatio;
  canvas.style.width = roll.clientWidth + 'px';
  canvas.style.height = roll.clientHeight + 'px';
}

// The token whose column is at x of the text.
function columnAt(x) {
  let low = 0, high = T - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (left[middle] <= x) low = middle; else high = middle - 1;
  }
  return low;
}

function draw() {
  const width = roll.clientWidth, height = roll.clientHeight, dx = GUTTER - roll.scrollLeft;
  const dy = -roll.scrollTop, from = columnAt(-dx + GUTTER), to = columnAt(width - dx);
  pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  pen.globalAlpha = 1;
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, width, height);
  for (const l of shown()) for (let c = 0; c < C; c++) drawBand(l, c, from, to, dx, dy);
  drawHead(from, to, dx, width);
  for (const l of shown()) for (let c = 0; c < C; c++) drawLens(l, c, from, to, dx, dy);
  for (const l of shown()) for (let c = 0; c < C; c++) drawName(l, c, dy);
}

function drawBand(l, c, from, to, dx, dy) {
  const top = bandTop(l, c) + dy, end = Math.min(roll.clientWidth, dx + left[T]), tall = lane > 3;
  pen.fillStyle = colours.band;
  pen.fillRect(GUTTER, top, end - GUTTER, bandHeight());
  const chosen = state.l == l && state.e >= 0 ? state.e : -1;
  pen.fillStyle = colours.rule;
  if (chosen >= 0) pen.fillRect(GUTTER, top + chosen * lane - 0.5, end - GUTTER, lane + 1);
  for (const t of [state.hover, state.token]) {
    if (t < from || t > to) continue;
    pen.fillStyle = colours.hover;
    pen.fillRect(dx + left[t], top, left[t + 1] - left[t], bandHeight());
  }
  pen.fillStyle = colours['i' + c % 4];
  for (let t = from; t <= to; t++)
    for (let k = 0, i = at(l, c, t); k < K; k++, i++) {
      const e = experts[i];
      const alpha = 0.35 + 0.65 * strength(weights[i]);
      pen.globalAlpha = chosen < 0 ? alpha : chosen == e ? 1 : 0.4 * alpha;
      pen.fillRect(dx + left[t] + 0.5, top + e * lane, left[t + 1] - left[t] - 1, lane - tall);
    }
  pen.globalAlpha = 1;
  if (state.step >= 0 && Math.floor(state.step / K) == l * C + c) {
    const t = state.token, y = top + experts[at(l, c, t) + state.step % K] * lane;
    pen.strokeStyle = colours.ink;
    pen.lineWidth = 2;
    pen.strokeRect(dx + left[t] - 1, y - 2, left[t + 1] - left[t] + 2, lane + 4 - tall);
  }
}

function drawHead(from, to, dx, width) {
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, width, HEAD);
  pen.textAlign = 'center';
  pen.textBaseline = 'middle';
  for (let t = from; t <= to; t++) {
    const here = t == state.token, near = t == state.hover, text = visible(labels[t]);
    const x = dx + left[t], w = left[t + 1] - left[t];
    if (here || near) {
      pen.fillStyle = here ? colours.ink : colours.hover;
      pen.fillRect(x, 5, w, HEAD - 8);
    }
    const ghost = /^[·↵→‥◆]+$/.test(text);
    pen.fillStyle = here ? colours.paper : ghost ? colours.faint : colours.ink;
    pen.font = (here ? '600 ' : '') + '13px ' + mono;
    pen.fillText(text, x + w / 2, HEAD / 2 + 1, w);
  }
}

function drawName(l, c, dy) {
  const top = bandTop(l, c) + dy;
  pen.fillStyle = colours.paper;
  pen.fillRect(0, top - (c ? GAP : LAYER_GAP), GUTTER, bandHeight() + LAYER_GAP + GAP);
  if (top + bandHeight() < HEAD) return drawCorner();
  pen.textBaseline = 'top';
  pen.textAlign = 'left';
  const roomy = bandHeight() >= 28;
  if (c == 0) {
    pen.font = '600 12px system-ui, sans-serif';
    pen.fillStyle = colours.ink;
    pen.fillText('layer ' + layers[l], 10, roomy ? top : top - 13);
  }
  pen.font = '12px system-ui, sans-serif';
  pen.fillStyle = colours['i' + c % 4];
  pen.fillText('iteration ' + c, 10, top + (roomy && c == 0 ? 15 : 0));
  if (bandHeight() >= 30) {
    pen.font = '9px system-ui, sans-serif';
    pen.fillStyle = colours.faint;
    pen.textAlign = 'right';
    pen.fillText('0', GUTTER - 5, top - 1);
    pen.textBaseline = 'bottom';
    pen.fillText(E - 1, GUTTER - 5, top + bandHeight() + 1);
  }
  drawCorner();
}
function drawCorner() {
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, GUTTER, HEAD);
}

// What is at a point of the chart: token, and where it is in a band, layer, iteration and expert.
function pointed(event) {
  const box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top + roll.scrollTop;
  if (x < GUTTER || x + roll.scrollLeft - GUTTER >= left[T]) return null;
  const found = {token: columnAt(x + roll.scrollLeft - GUTTER)};
  if (event.clientY - box.top < HEAD) return found;
  for (const l of shown())
    for (let c = 0; c < C; c++) {
      const inBand = (y - bandTop(l, c)) / lane;
      if (inBand < -1 || inBand >= E + 1) continue;
      // Rows are thin: a choice of this token that is as near as 5 pixels is what was meant.
      let e = Math.max(0, Math.min(E - 1, Math.floor(inBand))), nearest = 5 / lane;
      for (let k = 0, i = at(l, c, found.token), exact = e; k < K; k++)
        if (Math.abs(experts[i + k] - exact) <= nearest) {
          e = experts[i + k];
          nearest = Math.abs(e - exact) - 1e-9;
        }
      return {...found, l, c, e};
    }
  return found;
}

function describe(t, l, c, e) {
  const k = rankOf(l, c, t, e), i = at(l, c, t);
  return `token ${t} ${quoted(t)}, ${callName(l, c)}: expert ${e}, ` +
    (k < 0 ? 'not chosen' : `weight ${weights[i + k].toPrecision(3)}, rank ${k}`);
}
