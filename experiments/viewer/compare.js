// ---- two iterations -----------------------------------------------------------------------------
const cells = $('cells'), brush = cells.getContext('2d'), AXIS = 24;
const together = new Uint32Array(E * E), loads = [];
let n1, n2, side;                 // tokens of each expert; pixels of a cell
const callOf = n => [Math.floor(n / C), n % C];

function makeCompare() {
  const calls = [];
  for (let n = 0; n < L * C; n++) calls.push([n, callName(...callOf(n))]);
  options($('first'), calls);
  options($('second'), calls);
  $('loads').style.setProperty('--h', (E <= 32 ? 22 : 13) + 'px');
  for (let e = 0; e < E; e++) {
    const row = element('button', undefined, 'load');
    for (let half = 0; half < 2; half++) {
      const span = element('span');
      span.append(element('i'), element('em'));
      row.append(span);
      if (!half) row.append(element('b', e));
    }
    row.addEventListener('click', () => choose(callOf(state.first)[0], e));
    loads.push(row);
  }
  $('loads').append(...loads);
}

function count(l, c) {
  const n = new Uint32Array(E);
  for (let i = at(l, c, 0); i < at(l, c, 0) + T * K; i++) n[experts[i]]++;
  return n;
}

// Counts what the two iterations chose, and points at the most frequent pair.
function countPairs() {
  const [l1, c1] = callOf(state.first), [l2, c2] = callOf(state.second);
  n1 = count(l1, c1);
  n2 = count(l2, c2);
  together.fill(0);
  for (let t = 0; t < T; t++)
    for (let a = at(l1, c1, t), i = a; i < a + K; i++)
      for (let b = at(l2, c2, t), j = b; j < b + K; j++) together[experts[i] * E + experts[j]]++;
  const peak = together.indexOf(Math.max(...together));
  [state.row, state.column] = [Math.floor(peak / E), peak % E];
}

function showCompare() {
  const [l1, c1] = callOf(state.first), [l2, c2] = callOf(state.second);
  const most = Math.max(...n1, ...n2);
  let again = 0, chance = 0;
  for (let e = 0; e < E; e++) again += together[e * E + e], chance += n1[e] * n2[e] / T;
  $('first').value = state.first;
  $('second').value = state.second;
  $('compare-note').textContent = l1 != l2 ?
    'These are two layers, so the same number is not the same expert.' : c1 == c2 ?
    'This is one iteration and itself.' :
    `${percent(again / (T * K))} of the choices in iteration ${c2} go to an expert that the ` +
    `token had in iteration ${c1}. Routers that choose independently with these loads would reach ` +
    `${percent(chance / (T * K))}.`;
  loads.forEach((row, e) => {
    [[n1, c1], [n2, c2]].forEach(([n, c], half) => {
      const span = row.children[2 * half];
      span.style.setProperty('--hue', hue(c));
      span.style.setProperty('--w', n[e] / most);
      span.children[1].textContent = percent(n[e] / T).replace(' %', '');
    });
    row.setAttribute('aria-label', `expert ${e}: ${percent(n1[e] / T)} of the tokens, ` +
                     `then ${percent(n2[e] / T)}`);
    row.setAttribute('aria-pressed', state.e == e && (state.l == l1 || state.l == l2));
  });
  showCells();
}

function showCells() {
  side = Math.max(5, Math.min(22, Math.floor(420 / E)));
  const size = AXIS + E * side + 1, most = Math.max(1, ...together);
  cells.width = cells.height = size * devicePixelRatio;
  cells.style.width = cells.style.height = size + 'px';
  brush.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  brush.fillStyle = colours.band;
  brush.fillRect(AXIS, AXIS, E * side, E * side);
  brush.fillStyle = colours.ink;
  for (let a = 0; a < E; a++)
    for (let b = 0; b < E; b++) {
      brush.globalAlpha = together[a * E + b] / most;
      brush.fillRect(AXIS + b * side, AXIS + a * side, side - 1, side - 1);
    }
  brush.globalAlpha = 1;
  brush.fillStyle = colours.faint;
  brush.font = '10px ' + mono;
  brush.textAlign = 'center';
  brush.textBaseline = 'middle';
  const every = side >= 14 ? 1 : Math.ceil(16 / side / 4) * 4;
  for (let e = 0; e < E; e += every) {
    brush.fillText(e, AXIS + (e + 0.5) * side, AXIS / 2 + 3);
    brush.fillText(e, AXIS / 2, AXIS + (e + 0.5) * side);
  }
  const {row, column} = state, n = together[row * E + column];
  brush.strokeStyle = colours.i1;
  brush.lineWidth = 2;
  brush.strokeRect(AXIS + column * side - 1, AXIS + row * side - 1, side + 1, side + 1);
  $('pair').textContent = `expert ${row}, then ${column}: ${plural(n, 'token')}; by chance ` +
    (n1[row] * n2[column] / T).toFixed(1);
}
