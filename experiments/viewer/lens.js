// ---- the lens -----------------------------------------------------------------------------------
// What the model would say with so many iterations of a layer done; only if the page was made with
// --lens. Rows are (layer, iterations done, token), 0 .. C iterations.
const lens = D.lens && {
  guess: unpack(D.lens.guess, Uint16Array), other: unpack(D.lens.other, Uint16Array),
  sure: unpack(D.lens.sure, Float32Array), next: unpack(D.lens.next, Float32Array),
  loss: unpack(D.lens.loss, Float32Array), names: D.lens.names,
};
const seen = (l, done, t) => (l * (C + 1) + done) * T + t;

// Below a band: the darker, the more probable the true next token is after this iteration. A mark
// above it: the router would have chosen others on the y before.
function drawLens(l, c, from, to, dx, dy) {
  if (!lens) return;
  const top = bandTop(l, c) + dy;
  for (let t = from; t <= to; t++) {
    const i = seen(l, c + 1, t), x = dx + left[t], wide = left[t + 1] - left[t];
    pen.globalAlpha = lens.next[i] || 0;
    pen.fillStyle = colours.ink;
    pen.fillRect(x + 0.5, top + bandHeight() + 1, wide - 1, 3);
    pen.globalAlpha = 1;
    pen.fillStyle = colours['i' + c % 4];
    if (lens.other[i] == 1) pen.fillRect(x + wide / 2 - 1, top - 3, 2, 2);
  }
  if (l + 1 < L || c + 1 < C) return;
  pen.fillStyle = colours.i1;
  for (let t = from; t <= to; t++) {                // under the text: the loss of what comes next
    pen.globalAlpha = Math.min(1, (lens.loss[t] || 0) / 3);
    pen.fillRect(dx + left[t] + 0.5, HEAD, left[t + 1] - left[t] - 1, 3);
  }
  pen.globalAlpha = 1;
}

// What it would say, in words.
function guessed(l, done, t) {
  const i = seen(l, done, t), name = lens.names[lens.guess[i]];
  const text = isSpecial(name) ? name : `“${visible(name)}”`;
  return `${text} ${(100 * lens.sure[i]).toFixed(0)} %` + (lens.other[i] == 1 ? ' !' : '');
}

// The token at which an iteration of the last layer changes the probability of the next one most.
function mostChanged() {
  let most = 0, found = 0;
  for (let c = 0; c < C; c++)
    for (let t = 0; t + 1 < T; t++) {
      const change = Math.abs(lens.next[seen(L - 1, c + 1, t)] - lens.next[seen(L - 1, c, t)]);
      if (change > most) [most, found] = [change, t];
    }
  return found;
}
