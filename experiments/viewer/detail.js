// ---- the chain of a token -----------------------------------------------------------------------
// Its elements stay the same, so that the keyboard's focus does; only what they say changes.
const chips = [], links = [], said = [], before = [];
const tokenName = element('b'), tokenNumber = element('span');
const tokenPlace = element('div', '', 'around');
function makeChain() {
  const chain = $('chain'), title = element('div', '', 'token');
  title.append(tokenName, tokenNumber);
  chain.append(title, tokenPlace);
  for (let l = 0; l < L; l++) {
    const block = element('div', undefined, 'layer');
    const heading = element('h3', 'layer ' + layers[l]), early = element('span', '', 'said');
    if (lens) heading.append(early);
    before.push(early);
    block.append(heading);
    for (let c = 0; c < C; c++) {
      const call = element('div', undefined, 'call');
      call.style.setProperty('--hue', hue(c));
      call.append(element('span', 'iteration ' + c));
      for (let k = 0; k < K; k++) {
        const chip = element('button', undefined, 'chip');
        chip.append(element('b'), element('i'), element('small'));
        chip.addEventListener('click', () => choose(l, experts[at(l, c, now()) + k]));
        chips.push(chip);
        call.append(chip);
      }
      const words = element('span', '', 'said');
      if (lens) call.append(words);
      said.push(words);
      block.append(call);
    }
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    svg.setAttribute('aria-hidden', 'true');
    links.push(svg);
    block.append(svg);
    chain.append(block);
  }
  chain.style.setProperty('--k', K);
  if (C > 1) chain.append(element('p', 'A line joins an expert that is visited again.'));
  if (lens) chain.append(element('p', 'In quotes: what the model would say next if the layers ended ' +
    'there; ! if the router would have chosen others on the y before.'));
}
const now = () => state.hover >= 0 ? state.hover : state.token;

function showChain() {
  const t = now();
  tokenName.textContent = isSpecial(labels[t]) ? labels[t] : visible(labels[t]);
  tokenNumber.textContent = `token ${t}, id ${D.tokens[t]}`;
  const line = (a, b) => labels.slice(Math.max(0, a), b).map(visible).join('');
  tokenPlace.replaceChildren(line(t - 14, t), element('b', visible(labels[t])),
                             line(t + 1, t + 20));
  chips.forEach((chip, n) => {
    const k = n % K, c = Math.floor(n / K) % C, l = Math.floor(n / K / C), i = at(l, c, t) + k;
    const again = c > 0 && rankOf(l, c - 1, t, experts[i]) >= 0;
    chip.children[0].textContent = experts[i];
    chip.children[1].style.setProperty('--w', strength(weights[i]));
    chip.children[2].textContent = short(weights[i]);
    chip.setAttribute('aria-pressed', state.l == l && state.e == experts[i]);
    chip.setAttribute('aria-label', `${callName(l, c)}: expert ${experts[i]}, weight ` +
                      weights[i].toPrecision(3) + (again ? ', again' : ''));
    chip.classList.toggle('cursor', state.step == n && state.hover < 0);
  });
  if (lens) {
    before.forEach((words, l) => { words.textContent = guessed(l, 0, t); });
    said.forEach((words, n) => { words.textContent = guessed(Math.floor(n / C), n % C + 1, t); });
    if (lens.loss[t] >= 0) tokenNumber.textContent += `, loss ${lens.loss[t].toFixed(2)}`;
  }
  links.forEach((svg, l) => {             // an expert that is visited again is joined to itself
    const lines = [];
    for (let c = 1; c < C; c++)
      for (let k = 0; k < K; k++) {
        const before = rankOf(l, c - 1, t, experts[at(l, c, t) + k]);
        if (before < 0) continue;
        const a = chips[(l * C + c - 1) * K + before], b = chips[(l * C + c) * K + k];
        const row = a.parentElement, next = b.parentElement;
        const line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
        const ends = {x1: row.offsetLeft + a.offsetLeft + a.offsetWidth / 2,
                      y1: row.offsetTop + a.offsetTop + a.offsetHeight,
                      x2: next.offsetLeft + b.offsetLeft + b.offsetWidth / 2,
                      y2: next.offsetTop + b.offsetTop};
        for (const name in ends) line.setAttribute(name, ends[name]);
        lines.push(line);
      }
    svg.replaceChildren(...lines);
  });
}

// ---- what an expert reads -----------------------------------------------------------------------
const readings = [];
function makeReadings() {
  options($('expert-e'), [['', '–'], ...Array.from({length: E}, (_, e) => [e, e])]);
  options($('expert-l'), layers.map((layer, l) => [l, layer]));
  for (let c = 0; c < C; c++) {
    const column = element('div', undefined, 'reading'), text = element('div', undefined, 'text');
    const facts = element('p');
    column.style.setProperty('--hue', hue(c));
    text.tabIndex = 0;
    text.setAttribute('role', 'group');
    text.setAttribute('aria-label', `the text, with what the expert reads in iteration ${c}`);
    text.addEventListener('click', event => {
      const mark = event.target.closest('mark');
      if (mark) choose(state.l, state.e, +mark.dataset.t);
    });
    column.append(element('h3', 'iteration ' + c), facts, text);
    $('texts').append(column);
    readings.push({facts, text, marks: new Map()});
  }
}

function showReadings() {
  const {l, e} = state;
  $('expert-e').value = e < 0 ? '' : e;
  $('expert-l').value = l;
  const found = readings.map((_, c) => e < 0 ? [] : tokensOf(l, c, e));
  const both = found.reduce((a, b) => { const s = new Set(b); return a.filter(t => s.has(t)); });
  $('expert-note').textContent = e < 0 ? 'No expert is chosen: click one anywhere on this page.' :
    `With even shares an expert reads ${percent(K / E)} of the tokens in an iteration.` +
    (C < 2 ? '' : ` ${plural(both.length, 'token')} come${both.length == 1 ? 's' : ''} to it in ` +
      (C == 2 ? 'both iterations.' : `all ${C} iterations.`));
  readings.forEach(({facts, text, marks}, c) => {
    const mean = found[c].reduce((sum, t) => sum + weights[at(l, c, t) + rankOf(l, c, t, e)], 0);
    facts.textContent = e < 0 ? '' : `${plural(found[c].length, 'token')}, ` +
      percent(found[c].length / T) +
      (found[c].length ? `, with a mean weight of ${(mean / found[c].length).toPrecision(2)}` : '');
    const parts = [], print = t => isSpecial(labels[t]) ? '◆' : labels[t];
    marks.clear();
    let done = 0;
    for (const t of found[c]) {
      parts.push(labels.slice(done, t).map((_, i) => print(done + i)).join(''));
      const mark = element('mark', print(t).replace(/\n/g, '↵\n') || '‥');
      mark.dataset.t = t;
      mark.style.setProperty('--w', strength(weights[at(l, c, t) + rankOf(l, c, t, e)]));
      marks.set(t, mark);
      parts.push(mark);
      done = t + 1;
    }
    parts.push(labels.slice(done).map((_, i) => print(done + i)).join(''));
    text.replaceChildren(...parts);
  });
  showHere();
}
function showHere() {
  for (const {text, marks} of readings) {
    text.querySelector('.here')?.classList.remove('here');
    const mark = marks.get(state.token);
    if (!mark) continue;
    mark.classList.add('here');
    const y = mark.offsetTop - text.offsetTop;
    if (y < text.scrollTop || y > text.scrollTop + text.clientHeight - 30)
      text.scrollTop = y - text.clientHeight / 2;
  }
}
