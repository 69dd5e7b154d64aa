// Draws the run's charts and keeps them up to date: asks for the rounds that are new, smooths them, and writes what the
// tooltips show in the reader's digits. There are no words in here: charts.py and the page have them.
const POLL = 2000;
const POLL_HIDDEN = 30000;
const PATIENCE = 8000;
const OVERLAP = 8; // newest rounds are asked for again: late reports change them
const MOST_POINTS = 1500; // then the server's choice of the earlier rounds is fetched anew
const SMOOTHED = ["loss", "mlm_loss", "sop_loss", "speed", "computing"];
const CLOSER = 0.5;

const frame = document.getElementById("charts");
const language = document.documentElement.lang;

function writer(options) {
  const format = new Intl.NumberFormat(language, options);
  return (value) => (value === null || Number.isNaN(value) ? "–" : format.format(value));
}

const places = (count) => writer({ minimumFractionDigits: count, maximumFractionDigits: count });
const tick = writer({ maximumFractionDigits: 6 });
const share = writer({ style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const moment = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });
const TEXTS = {
  round: places(0),
  samples: places(0),
  volunteers: places(0),
  loss: places(2),
  mlm_loss: places(2),
  sop_loss: places(2),
  speed: places(1),
  learning_rate: writer({ maximumSignificantDigits: 3 }),
  computing: share,
  mlm_accuracy: share,
  sop_accuracy: share,
  finished: (seconds) => (seconds === null ? "" : moment.format(1000 * seconds)),
};

// Two passes of an exponential mean, there and back, so that the smoothed line does not lag behind.
function smooth(rounds, values) {
  const reach = Math.max(3, (rounds.at(-1) - rounds[0]) / 60); // in rounds
  const pass = (order, from) => {
    const into = new Array(values.length).fill(NaN);
    let mean = 0;
    let weight = 0;
    let last = null;
    for (const at of order) {
      if (from[at] === null || Number.isNaN(from[at])) continue;
      const decay = last === null ? 0 : Math.exp(-Math.abs(rounds[at] - last) / reach);
      const own = last === null ? 1 - Math.exp(-1 / reach) : 1 - decay;
      mean = mean * decay + from[at] * own;
      weight = weight * decay + own;
      into[at] = mean / weight;
      last = rounds[at];
    }
    return into;
  };
  const order = [...rounds.keys()];
  const there = pass(order, values);
  return pass(order.reverse(), there);
}

function drawn(columns) {
  const data = {};
  for (const [name, values] of Object.entries(columns)) {
    data[name] = values.map((value) => (value === null ? NaN : value));
    if (name in TEXTS) data[`${name}_text`] = values.map(TEXTS[name]);
  }
  return data;
}

function joined(known, fresh, after) {
  const kept = known.round.filter((round) => round <= after).length;
  return Object.fromEntries(
    Object.entries(fresh).map(([name, values]) => [name, [...known[name].slice(0, kept), ...values]]),
  );
}

let rounds = { round: [] };
let heldout = { round: [] };
let plots = null;
let shown = null; // what the x axis was last set to by us; anything else is the reader's
let last = ""; // answer

const ticked = () => new Set([...frame.querySelectorAll("input[name=curve]:checked")].map((box) => box.value));
const scale = () => frame.querySelector("input[name=scale]:checked").value;

function xRange() {
  return plots.loss.x_range;
}

function isWhole() {
  return shown === null || (xRange().start === shown[0] && xRange().end === shown[1]);
}

function showWhole() {
  const ends = [...rounds.round.slice(0, 1), ...rounds.round.slice(-1), ...heldout.round.slice(0, 1)];
  const first = Math.min(...ends);
  const newest = Math.max(first + 1, ...ends);
  const margin = (newest - first) * 0.02;
  shown = [first - margin, newest + margin];
  xRange().setv({ bounds: shown, start: shown[0], end: shown[1] });
}

function zoom(factor) {
  const { start, end } = xRange();
  // towards the newest rounds where they are shown, which most readers want to look at
  const right = end >= shown[1] ? end : (start + end) / 2 + ((end - start) / 2) * factor;
  const width = Math.max(2, (end - start) * factor);
  const to = Math.min(shown[1], right);
  if (width > (shown[1] - shown[0]) * 0.99) showWhole();
  else xRange().setv({ start: Math.max(shown[0], to - width), end: to });
}

function fitLoss() {
  const { start, end } = xRange();
  const is = (word) => ticked().has(word);
  const columns = ["loss", "mlm_loss", "sop_loss"].filter((_, at) => is(["total", "words", "order"][at]));
  const values = [];
  for (const [data, isShown] of [[rounds, true], [heldout, is("heldout")]]) {
    data.round.forEach((round, at) => {
      if (!isShown || round < start || round > end) return;
      for (const name of columns) if (data[name][at] > 0) values.push(data[name][at]);
    });
  }
  if (values.length === 0) return;
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  if (scale() === "log") {
    const margin = Math.max(1.02, (high / low) ** 0.06);
    [low, high] = [low / margin, high * margin];
  } else {
    const margin = Math.max(0.02, (high - low) * 0.06);
    [low, high] = [low - margin, high + margin];
  }
  plots.loss.y_range.setv({ start: low, end: high });
}

function fill() {
  const stays = !isWhole();
  const data = drawn(rounds);
  for (const name of SMOOTHED) data[`${name}_smooth`] = smooth(rounds.round, rounds[name]);
  data.outcome = rounds.failed.map((failed) => (failed ? frame.dataset.failed : ""));
  plots.loss.document.get_model_by_name("rounds").data = data;
  plots.loss.document.get_model_by_name("heldout").data = drawn(heldout);
  if (stays) {
    const margin = shown[1] - shown[0];
    const newest = Math.max(...rounds.round.slice(-1), ...heldout.round.slice(-1));
    shown[1] = newest + margin * 0.02;
    xRange().bounds = [...shown];
  } else {
    showWhole();
  }
  fitLoss();
}

function showCurves() {
  const words = ticked();
  for (const renderer of plots.loss.renderers) {
    renderer.visible = renderer.name.split(" ").every((word) => words.has(word));
  }
  fitLoss();
}

function showScale() {
  const [linear, log] = plots.loss.tags;
  const [y_scale, ticker] = scale() === "log" ? log : linear;
  plots.loss.y_scale = y_scale;
  plots.loss.left[0].ticker = ticker;
  fitLoss();
}

function chooseDrag() {
  const name = frame.querySelector("input[name=drag]:checked").value;
  for (const plot of Object.values(plots)) {
    for (const tool of plot.toolbar.tools) {
      if (tool.name === "move" || tool.name === "part") tool.active = tool.name === name;
    }
  }
}

async function draw() {
  Bokeh.set_log_level("error");
  const answer = await fetch("charts", {
    headers: { "Accept-Language": language },
    signal: AbortSignal.timeout(PATIENCE),
  });
  const { docs, items } = await answer.json();
  await Bokeh.embed.embed_items(docs, items);
  const book = Bokeh.documents[0];
  plots = Object.fromEntries(
    ["loss", "speed", "volunteers", "rate", "computing"].map((name) => [name, book.get_model_by_name(name)]),
  );
  for (const [name, plot] of Object.entries(plots)) {
    const write = name === "computing" ? writer({ style: "percent" }) : tick;
    plot.below[0].formatter.doFormat = (ticks) => ticks.map(tick);
    plot.left[0].formatter.doFormat = (ticks) => ticks.map(write);
    for (const tool of plot.toolbar.tools) if (tool.name === "wheel") tool.active = true;
  }
  for (const [name, act] of [["curve", showCurves], ["scale", showScale], ["drag", chooseDrag]]) {
    for (const input of frame.querySelectorAll(`input[name=${name}]`)) input.addEventListener("change", act);
  }
  // a finger that touches a chart most often wants to scroll the page
  if (matchMedia("(pointer: fine)").matches) frame.querySelector("input[name=drag][value=part]").checked = true;
  for (const button of frame.querySelectorAll("button[data-zoom]")) {
    button.addEventListener("click", () => {
      if (button.dataset.zoom === "whole") showWhole();
      else zoom(button.dataset.zoom === "closer" ? CLOSER : 1 / CLOSER);
    });
  }
  xRange().change.connect(fitLoss);
  // nor does a wheel that scrolls the page; Bokeh could be told to ask for Ctrl, and would say so in English
  frame.addEventListener("wheel", (event) => event.ctrlKey || event.stopPropagation(), { capture: true });
  chooseDrag();
  showCurves();
}

async function update() {
  const newest = rounds.round.at(-1);
  const grown = newest !== undefined && rounds.round.length < MOST_POINTS;
  const after = grown ? Math.max(0, newest - OVERLAP) : null;
  const measured = heldout.round.at(-1) ?? -1;
  const query = grown ? `?after=${after}&measured=${measured}` : "";
  const answer = await fetch(`chart-data${query}`, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!answer.ok) return;
  const text = await answer.text();
  if (text === last) return;
  const fresh = JSON.parse(text);
  rounds = fresh.whole ? fresh.rounds : joined(rounds, fresh.rounds, after);
  heldout = fresh.whole ? fresh.heldout : joined(heldout, fresh.heldout, Math.min(measured, rounds.round.at(-1)));
  last = text;
  if (rounds.round.length === 0 || !window.Bokeh) return;
  frame.hidden = false;
  if (plots === null) await draw();
  fill();
}

let timer;

async function poll() {
  try {
    await update();
  } catch (error) {
    // the coordinator is away: what is drawn stays, and the next poll asks again
    if (!(error instanceof TypeError || error instanceof DOMException)) throw error;
  } finally {
    clearTimeout(timer);
    timer = setTimeout(poll, document.hidden ? POLL_HIDDEN : POLL);
  }
}

document.addEventListener("visibilitychange", () => document.hidden || poll());

poll();
