// ---- events -------------------------------------------------------------------------------------
let waiting = new Set();
// Calls each function once, before the next picture.
function soon(...functions) {
  if (!waiting.size) requestAnimationFrame(() => {
    const all = waiting;
    waiting = new Set();
    for (const f of all) f();
  });
  functions.forEach(f => waiting.add(f));
}
const everything = [layOut, draw, showChain, showReadings, countPairs, showCompare];

function choose(l, e, token = state.token) {
  Object.assign(state, {l, e, token, hover: -1});
  if (state.show >= 0 && e >= 0) state.show = l;
  $('show').value = state.show;
  reveal();
  soon(...state.show >= 0 ? [layOut] : [], draw, showChain, showReadings, showCompare);
  writeAddress();
}
function select(token) {
  state.token = Math.max(0, Math.min(T - 1, token));
  state.hover = -1;
  reveal();
  say();
  soon(draw, showChain, showHere);
  writeAddress();
}
// Scrolls the chart until the token is in it, and the place in its chain.
function reveal() {
  const x = left[state.token], room = roll.clientWidth - GUTTER;
  if (x < roll.scrollLeft + 20 || x > roll.scrollLeft + room - 40) roll.scrollLeft = x - room / 2;
  if (state.step < 0) return;
  const call = callOf(Math.floor(state.step / K));
  if (!shown().includes(call[0])) return;
  const y = bandTop(...call), tall = roll.clientHeight - HEAD;
  if (y < roll.scrollTop + HEAD || y + bandHeight() > roll.scrollTop + HEAD + tall)
    roll.scrollTop = y - HEAD - tall / 2;
}
function say() {
  const t = state.token, [l, c] = callOf(Math.floor(state.step / K));
  $('readout').textContent = state.step < 0 ? `token ${t} ${quoted(t)}` :
    describe(t, l, c, experts[at(l, c, t) + state.step % K]);
}

roll.addEventListener('scroll', () => soon(draw));
roll.addEventListener('mousemove', event => {
  const p = pointed(event);
  state.hover = p ? p.token : -1;
  if (!p) say();
  else if (p.l === undefined) $('readout').textContent = `token ${p.token} ${quoted(p.token)}`;
  else $('readout').textContent = describe(p.token, p.l, p.c, p.e);
  soon(draw, showChain);
});
roll.addEventListener('mouseleave', () => { state.hover = -1; say(); soon(draw, showChain); });
roll.addEventListener('click', event => {
  const p = pointed(event);
  if (!p) return;
  state.step = -1;
  if (p.l === undefined) return select(p.token);
  const k = rankOf(p.l, p.c, p.token, p.e);
  if (k >= 0) state.step = (p.l * C + p.c) * K + k;
  choose(p.l, p.e, p.token);
  say();
});
roll.addEventListener('keydown', event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const t = state.token, by = event.shiftKey ? 10 : 1;
  const own = shown().map(l => l * C * K), least = own[0], most = own[own.length - 1] + C * K - 1;
  const step = x => { state.step = Math.max(least, Math.min(most, x)); select(t); };
  const keys = {
    ArrowLeft: () => select(t - by), ArrowRight: () => select(t + by),
    PageUp: () => select(t - 50), PageDown: () => select(t + 50),
    Home: () => select(0), End: () => select(T - 1),
    ArrowUp: () => step(state.step < 0 ? most : state.step - 1),
    ArrowDown: () => step(state.step < 0 ? least : state.step + 1),
    Enter: () => {
      if (state.step < 0) state.step = least;
      const [l, c] = callOf(Math.floor(state.step / K));
      choose(l, experts[at(l, c, t) + state.step % K]);
      say();
    },
    Escape: () => {
      if (state.step >= 0) { state.step = -1; select(t); } else choose(state.l, -1);
    },
  };
  keys[' '] = keys.Enter;
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});

$('show').addEventListener('change', () => {
  state.show = +$('show').value;
  state.step = -1;
  soon(layOut, draw);
  writeAddress();
});
$('expert-e').addEventListener('change', () => {
  const {value} = $('expert-e');
  choose(state.l, value === '' ? -1 : +value);
});
$('expert-l').addEventListener('change', () => choose(+$('expert-l').value, state.e));
for (const which of ['first', 'second'])
  $(which).addEventListener('change', () => {
    state[which] = +$(which).value;
    soon(countPairs, showCompare);
    writeAddress();
  });

function pointPair(row, column) {
  if (row < 0 || column < 0 || row >= E || column >= E) return;
  Object.assign(state, {row, column});
  soon(showCells);
}
cells.addEventListener('mousemove', event => {
  const box = cells.getBoundingClientRect(), place = x => Math.floor((x - AXIS) / side);
  pointPair(place(event.clientY - box.top), place(event.clientX - box.left));
});
$('matrix').addEventListener('keydown', event => {
  const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  pointPair(state.row + move[0], state.column + move[1]);
});

// ---- begin --------------------------------------------------------------------------------------
$('summary').textContent = `${D.model}: ${plural(T, 'token')}; ${plural(L, 'layer')} of experts, ` +
  `each with ${plural(C, 'iteration')}, in which a token visits ${K} of ${E} experts` +
  (D.shared ? ', and the shared one, which is not drawn.' : '.');
document.title = `Routing of ${D.model}`;
options($('show'), [[-1, 'all layers'], ...layers.map((layer, l) => [l, 'layer ' + layer])]);
makeChain();
makeReadings();
makeCompare();
if (lens) state.token = mostChanged();
readAddress();
$('show').value = state.show;
for (const f of everything) f();
reveal();
draw();
say();
addEventListener('resize', () => soon(layOut, draw, showChain));
addEventListener('hashchange', () => {
  readAddress();
  $('show').value = state.show;
  soon(...everything, reveal);
});
matchMedia('(prefers-color-scheme: dark)')
  .addEventListener('change', () => soon(layOut, draw, showCompare));
