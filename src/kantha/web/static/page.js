// Keeps the run's page up to date without a reload. The page is complete without it; what it writes is what pages.py
// and run.html write. Everything from the network goes in by textContent: names come from strangers.
"use strict";

const POLL = 2000;
const POLL_HIDDEN = 30000;
const PATIENCE = 8000;

const byId = (id) => document.getElementById(id);

function setText(element, text) {
  // An equal text is left alone, so that a selection in it, and a screen reader's place, survive.
  if (element.textContent !== text) element.textContent = text;
}

const setField = (name, text) => setText(document.querySelector(`[data-field="${name}"]`), text);

function number(value, digits = 0) {
  if (value === null) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function duration(seconds) {
  if (seconds === null) return "–";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

const percent = (share) => (share === null ? "–" : `${number(100 * share, 1)} %`);
const ago = (seconds) => (seconds < 2 ? "just now" : `${duration(seconds)} ago`);
const many = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

function state(status) {
  if (status.annealed === 1) {
    return `The run is finished, after ${many(status.round, "round")}: its model is annealed. Thank you!`;
  }
  const helping = status.volunteers.length;
  if (helping === 0) return "Nobody is helping right now.";
  const annealing = status.annealed === null ? "" : ` The annealing is ${percent(status.annealed)} done.`;
  return `Round ${number(status.round + 1)} is under way with ${many(helping, "volunteer")}.${annealing}`;
}

function sentence(round) {
  const facts = `${many(round.volunteers, "volunteer")}, ${many(round.samples, "sample")}, loss ${number(round.loss, 2)}`;
  const why = round.reason ? ` (${round.reason})` : "";
  if (round.failed) return `Round ${round.round} failed at first${why} and was tried again: ${facts}`;
  return `Round ${round.round}: ${facts}`;
}

function heldoutSentence(last) {
  if (!last) return "Held-out text has not been measured yet.";
  const right = `${percent(last.mlm_accuracy)} of the hidden words guessed right, and ${percent(last.sop_accuracy)} of`;
  return `Held-out text at round ${number(last.round)}: loss ${number(last.loss, 2)}; ${right} the sentence orders.`;
}

function showFigures(status) {
  const last = status.rounds.at(-1);
  const heldout = status.heldout.at(-1);
  const averaging = status.samples_in_round >= status.target_batch_size;
  const counted = `${number(status.samples_in_round)} of ${number(status.target_batch_size)} samples`;
  const progress = averaging ? "averaging" : counted;
  setField("loss", number(last ? last.loss : null, 2));
  setField("heldout", number(heldout ? heldout.loss : null, 2));
  setField("heldout-sentence", heldoutSentence(heldout));
  setField("round", number(status.round));
  setField("samples", number(status.samples));
  setField("speed", number(status.samples_per_second, 1));
  setField("volunteers", number(status.volunteers.length));
  setField("next", averaging ? "now" : duration(status.seconds_to_next_round));
  setField("computing", percent(status.computing_share));
  setField("failed", number(status.failed_rounds));
  setField("checkpoint", status.checkpoint_round ? `round ${number(status.checkpoint_round)}` : "none yet");
  setField("progress", `Round ${number(status.round + 1)}: ${progress}`);
  setField("first-round", progress);
  byId("progress").max = status.target_batch_size;
  byId("progress").value = status.samples_in_round;
}

function showVolunteers(volunteers) {
  byId("no-volunteers").hidden = volunteers.length > 0;
  byId("helping").hidden = volunteers.length === 0;
  const body = byId("volunteers");
  while (body.rows.length > volunteers.length) body.deleteRow(-1);
  volunteers.forEach((volunteer, index) => {
    const cells = [
      volunteer.name,
      volunteer.state,
      number(volunteer.samples),
      number(volunteer.samples_per_second, 1),
      number(volunteer.loss, 2),
      volunteer.device,
      ago(volunteer.seconds_since_seen),
    ];
    const row = body.rows[index] ?? body.insertRow();
    if (row.cells.length === 0) {
      row.append(...cells.map((_, column) => document.createElement(column === 0 ? "th" : "td")));
      row.cells[0].scope = "row";
    }
    cells.forEach((text, column) => setText(row.cells[column], text));
  });
}

function showRounds(rounds) {
  byId("no-rounds").hidden = rounds.length > 0;
  if (rounds.length === 0) return;
  const list = byId("rounds");
  const last = rounds.slice(-Number(list.dataset.shown)).reverse();
  while (list.children.length < last.length) list.append(document.createElement("li"));
  last.forEach((round, index) => {
    setText(list.children[index], sentence(round));
    list.children[index].classList.toggle("failed", round.failed);
  });
}

let chartDrawn = false;

async function drawChart() {
  chartDrawn = true;
  Bokeh.set_log_level("error");
  await Bokeh.embed.embed_item(JSON.parse(byId("chart-item").textContent));
  const plot = Bokeh.documents[0].get_model_by_name("loss");
  byId("curves").addEventListener("change", () => {
    const ticked = new Set([...byId("curves").querySelectorAll(":checked")].map((box) => box.value));
    for (const renderer of plot.renderers) renderer.visible = renderer.name.split(" ").every((word) => ticked.has(word));
  });
  byId("curves").hidden = false;
}

async function update() {
  let status;
  try {
    const answer = await fetch("api/v1/status", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!answer.ok) throw new Error(`the coordinator answered ${answer.status}`);
    status = await answer.json();
  } catch {
    document.body.classList.add("lost");
    setText(byId("state"), "Connection lost, trying again…");
    return;
  }
  document.body.classList.remove("lost");
  setText(byId("state"), state(status));
  showFigures(status);
  showVolunteers(status.volunteers);
  showRounds(status.rounds);
  if (status.rounds.length > 0 && !chartDrawn && window.Bokeh) drawChart();
}

let timer;

async function poll() {
  try {
    await update();
  } finally {
    clearTimeout(timer);
    timer = setTimeout(poll, document.hidden ? POLL_HIDDEN : POLL);
  }
}

document.addEventListener("visibilitychange", () => document.hidden || poll());

if (navigator.clipboard) {
  const copy = byId("copy");
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(byId("command").textContent);
    copy.textContent = "Copied";
  });
}

poll();
