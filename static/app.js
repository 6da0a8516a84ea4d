// The page: a photo goes to POST caption, what comes back is shown. See docs/app.md.

const $ = (id) => document.getElementById(id);
const main = document.querySelector("main");
const settings = $("settings");
const HINTS = {
  beam: "Follows several sentences at once and keeps the most probable.",
  greedy: "Takes the most probable word each time: the fastest, one caption only.",
  sample: "Draws each word by chance: captions are livelier, and wrong more often.",
};
const ALTERNATIVES = 5;

let photo = null; // the File or Blob shown
let captions = [];
let chosen = 0; // which of the captions is shown large
let request = null; // the AbortController of the one under way
let seed = 0;
let most = Infinity; // bytes

// --- a photo comes in

function take(file) {
  if (!file) return;
  photo = file;
  seed = 0;
  URL.revokeObjectURL($("photo").src);
  $("photo").alt = "The photo chosen";
  $("photo").hidden = false;
  $("unseen").hidden = true;
  $("photo").src = URL.createObjectURL(file);
  $("drop").hidden = true;
  $("figure").hidden = false;
  show([]);
  $("choose").textContent = "Choose another";
  ask();
}

$("photo").addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = $("photo");
  $("photo").parentElement.style.setProperty("--ratio", width / height || 1.5);
});
$("photo").addEventListener("error", () => {
  $("photo").hidden = true;
  $("unseen").hidden = false;
});

for (const input of [$("file"), $("shot")]) {
  input.addEventListener("change", () => {
    take(input.files[0]);
    input.value = ""; // so that the same file can be chosen once more
  });
}
$("choose").addEventListener("click", () => $("file").click());
$("drop").addEventListener("click", () => $("file").click());

let inside = 0; // drag events come for every element that is crossed
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
function drag(change) {
  inside = change === 0 ? 0 : inside + change;
  document.body.classList.toggle("dragging", inside > 0);
}
document.addEventListener("dragenter", (event) => holdsFiles(event) && drag(1));
document.addEventListener("dragleave", (event) => holdsFiles(event) && drag(-1));
document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  drag(0);
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file) {
    event.preventDefault();
    take(file);
  }
});

// --- the camera: the phone's own app where there is a touch screen, else a live video

const touch = matchMedia("(pointer: coarse)").matches;
const live = Boolean(navigator.mediaDevices?.getUserMedia);
$("camera").hidden = !touch && !live;
$("camera").addEventListener("click", () => (touch ? $("shot").click() : openBooth()));

async function openBooth() {
  try {
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 1280 } },
    });
  } catch {
    fail("The camera can’t be used: there is none, or the browser was not allowed to.");
    return;
  }
  $("booth").showModal();
}
$("booth").addEventListener("close", () => {
  for (const track of $("video").srcObject?.getTracks() ?? []) track.stop();
  $("video").srcObject = null;
});
$("leave").addEventListener("click", () => $("booth").close());
$("snap").addEventListener("click", () => {
  const video = $("video");
  if (!video.videoWidth) return; // the first frame has not come yet
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    $("booth").close();
    take(blob);
  }, "image/jpeg", 0.95);
});

// --- asking for captions

async function ask() {
  if (!photo) return;
  request?.abort();
  const mine = (request = new AbortController());
  $("error").hidden = true;
  look(null);
  if (photo.size > most) {
    fail(`This file has ${megabytes(photo.size)} MB; at most ${megabytes(most)} MB are taken.`);
    return;
  }
  main.dataset.state = captions.length ? "again" : "first";
  $("status").textContent = "Captioning the photo.";
  try {
    const response = await fetch("caption", { method: "POST", body: form(), signal: mine.signal });
    const answer = await response.json();
    if (mine !== request) return;
    if (!response.ok) throw new Error(answer.error);
    main.dataset.state = "done";
    show(answer.captions);
    const more = captions.length > 1 ? ` ${captions.length - 1} alternatives below.` : "";
    $("status").textContent = `Caption: ${sentence()}.${more}`;
  } catch (error) {
    if (mine !== request || error.name === "AbortError") return;
    const lost = error instanceof TypeError || error instanceof SyntaxError;
    fail(lost ? "The server can’t be reached. Is it still running?" : error.message);
  }
}

function form() {
  const method = settings.elements.method.value;
  const data = new FormData();
  data.append("image", photo, photo.name ?? "photo.jpg");
  data.append("method", method);
  data.append("max_words", settings.elements.max_words.value);
  if (method === "beam") {
    const beams = settings.elements.beam_size.value;
    data.append("beam_size", beams);
    data.append("n", Math.min(ALTERNATIVES, beams)); // more would widen the search
  }
  if (method === "sample") {
    data.append("n", ALTERNATIVES);
    data.append("temperature", settings.elements.temperature.value);
    data.append("seed", seed);
  }
  if (method === "greedy") data.append("n", 1);
  return data;
}

function fail(message) {
  main.dataset.state = photo ? "failed" : "empty";
  show([]);
  $("error").textContent = /[.?!]$/.test(message) ? message : `${message}.`;
  $("error").hidden = false;
  $("status").textContent = "";
}

// --- showing them

function show(found) {
  captions = found;
  $("result").hidden = !captions.length;
  $("others").hidden = captions.length < 2;
  $("list").replaceChildren(...captions.map(row));
  if (captions.length) choose(0);
  else look(null);
}

function row(caption, index) {
  const item = document.createElement("li");
  const button = make("button", "", item);
  button.type = "button";
  make("span", caption.text || "(no words)", button);
  const share = make("span", percent(caption.probability), button);
  share.className = "share";
  share.title = `log-probability ${caption.log_prob.toFixed(2)}`;
  button.addEventListener("click", () => {
    choose(index);
    $("status").textContent = `Shown: ${sentence()}.`;
  });
  return item;
}

function choose(index) {
  chosen = index;
  const { words, attention, probability } = captions[index];
  look(null);
  $("caption").replaceChildren();
  words.forEach((word, place) => {
    const element = make(attention ? "button" : "span", word, $("caption"));
    if (!attention) return;
    element.type = "button";
    element.tabIndex = place ? -1 : 0;
    element.addEventListener("mouseenter", () => look(place));
    element.addEventListener("mouseleave", () => look(focused()));
    element.addEventListener("focus", () => look(place));
    element.addEventListener("blur", () => look(null));
    element.addEventListener("click", () => look(place));
  });
  if (!words.length) make("em", "(no words)", $("caption"));
  $("score").textContent = `Each word ${percent(probability)} probable, on average`;
  $("photo").alt = captions[index].text;
  $("list").querySelectorAll("button").forEach((button, place) => {
    button.setAttribute("aria-pressed", String(place === index));
  });
}

const focused = () => {
  const place = [...$("caption").children].indexOf(document.activeElement);
  return place < 0 ? null : place;
};

$("caption").addEventListener("keydown", (event) => {
  const words = [...$("caption").querySelectorAll("button")];
  const now = words.indexOf(document.activeElement);
  const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: words.length - 1 }[event.key];
  if (now < 0 || next === undefined) return;
  event.preventDefault();
  const target = words[Math.max(0, Math.min(next, words.length - 1))];
  for (const word of words) word.tabIndex = word === target ? 0 : -1;
  target.focus();
});

// --- what a word looked at: the photo is dimmed elsewhere

function look(place) {
  [...$("caption").children].forEach((word, index) => word.classList.toggle("on", index === place));
  const attention = captions[chosen]?.attention;
  const where = place === null || !attention ? null : attention[place];
  $("veil").classList.toggle("shown", Boolean(where));
  $("look").replaceChildren();
  if (!where) {
    $("look").textContent = attention ? `${touch ? "Tap" : "Point at"} a word to see where the model looked.` : "";
    return;
  }
  drawVeil(where);
  make("q", captions[chosen].words[place], $("look"));
  $("look").append(` looked most at the ${region(where)}`);
}

function drawVeil(where) {
  const [rows, columns, fine] = [where.length, where[0].length, 24];
  const all = where.flat();
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const veil = $("veil");
  [veil.width, veil.height] = [columns * fine, rows * fine];
  const context = veil.getContext("2d");
  const pixels = context.createImageData(veil.width, veil.height);
  for (let y = 0; y < veil.height; y++) {
    for (let x = 0; x < veil.width; x++) {
      const value = between(where, (y + 0.5) / fine - 0.5, (x + 0.5) / fine - 0.5);
      const share = high > low ? (value - low) / (high - low) : 1;
      pixels.data[4 * (y * veil.width + x) + 3] = 200 * (1 - share) ** 1.3;
    }
  }
  context.putImageData(pixels, 0, 0);
}

function between(grid, y, x) {
  // Smooth steps between the middles of the cells, flat beyond the outermost.
  const [top, down] = neighbours(y, grid.length);
  const [left, across] = neighbours(x, grid[0].length);
  const mix = (row) => grid[row][left] * (1 - across) + grid[row][Math.min(left + 1, grid[0].length - 1)] * across;
  return mix(top) * (1 - down) + mix(Math.min(top + 1, grid.length - 1)) * down;
}

function neighbours(place, count) {
  const held = Math.max(0, Math.min(place, count - 1));
  const first = Math.floor(held);
  const part = held - first;
  return [first, part * part * (3 - 2 * part)];
}

function region(where) {
  const best = where.flat().reduce((top, value, index, all) => (value > all[top] ? index : top), 0);
  const third = (place, count) => Math.floor(((place + 0.5) / count) * 3);
  const row = ["top", "middle", "bottom"][third(Math.floor(best / where[0].length), where.length)];
  const column = ["left", "middle", "right"][third(best % where[0].length, where[0].length)];
  return row === column ? "middle" : column === "middle" ? `${row} middle` : row === "middle" ? `${column} side` : `${row} ${column}`;
}

// --- copying

$("copy").addEventListener("click", async () => {
  const said = (await copied(captions[chosen].text)) ? "Copied" : "Not copied";
  $("copy").textContent = said;
  $("status").textContent = `${said}.`;
  setTimeout(() => ($("copy").textContent = "Copy"), 2000);
});

async function copied(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { /* not allowed: the old way may be */ }
  }
  // Without https there is no clipboard but this one.
  const area = make("textarea", text, document.body);
  area.className = "unseen";
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  $("copy").focus();
  return done;
}

// --- settings

let pause = 0;
settings.addEventListener("input", () => {
  tell();
  clearTimeout(pause);
  pause = setTimeout(ask, 250); // a slider on its way passes many values
});
settings.addEventListener("submit", (event) => event.preventDefault());
$("again").addEventListener("click", () => {
  seed += 1;
  ask();
});

function tell() {
  const method = settings.elements.method.value;
  $("method-hint").textContent = HINTS[method] ?? "";
  for (const part of settings.querySelectorAll("[data-for]")) part.hidden = part.dataset.for !== method;
  const units = { max_words: ["word", "words"], beam_size: ["beam", "beams"] };
  for (const output of settings.querySelectorAll("output")) {
    const [name] = output.htmlFor;
    const value = settings.elements[name].value;
    const unit = units[name]?.[Number(value === "1" ? 0 : 1)] ?? "";
    output.value = `${value} ${unit}`.trim();
    settings.elements[name].setAttribute("aria-valuetext", output.value);
  }
}

function offer(method) {
  const last = settings.querySelector(".choices").lastElementChild;
  const [button, label] = last.parentElement.appendChild(last.cloneNode(true)).children;
  button.value = method;
  label.textContent = method;
}

async function setUp() {
  settings.elements.method.value = "beam";
  tell();
  try {
    const about = await (await fetch("health")).json();
    most = about.max_mb * 1e6;
    const known = about.settings;
    known.method.choices.filter((name) => !(name in HINTS)).forEach(offer); // methods added since
    settings.elements.method.value = known.method.default;
    settings.elements.beam_size.value = known.beam_size.default;
    settings.elements.temperature.value = known.temperature.default;
    settings.elements.max_words.max = known.max_words.most;
    settings.elements.max_words.value = known.max_words.default ?? known.max_words.most;
    tell();
  } catch {
    fail("The server can’t be reached. Is it still running?");
  }
}

// --- small things

const sentence = () => captions[chosen].text || "no words";
const megabytes = (bytes) => (bytes / 1e6).toPrecision(3).replace(/\.?0+$/, "");
function percent(share) {
  const whole = 100 * share;
  return whole > 0 && whole < 1 ? "below 1 %" : `${Math.round(whole)} %`;
}

function make(tag, text, parent) {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

setUp();
