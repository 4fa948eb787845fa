"use strict";
// Numbers under the pointer: the step that one chart is pointed at is shown in all of them.
const units = {
  seconds: [["s", 1], ["ms", 1e-3], ["µs", 1e-6]],
  gib: [["GiB", 1], ["MiB", 2 ** -10], ["KiB", 2 ** -20]],
  bytes: [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]],
};
const short = (value, digits) => String(Number(value.toPrecision(digits)));
function shown(value, kind) {
  if (kind === "count") return Math.round(value).toLocaleString("en");
  if (kind === "share") return short(100 * value, 3) + " %";
  if (kind === "rate") return value ? value.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2") : "0";
  if (kind in units) {
    const [unit, size] = units[kind].find(([, size]) => Math.abs(value) >= size) || units[kind][value ? units[kind].length - 1 : 0];
    return short(value / size, 3) + " " + unit;
  }
  if (value && !(Math.abs(value) >= 1e-4 && Math.abs(value) < 1e9)) return value.toExponential(3);
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : short(value, 4);
}
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}
const charts = [...document.querySelectorAll("figure.chart")].map((figure) => {
  const told = JSON.parse(figure.querySelector("script").textContent);
  const outputs = [...figure.querySelectorAll("output")];
  return { figure, told, outputs, last: outputs.map((output) => output.textContent) };
});
function point(step) {
  for (const { figure, told, outputs, last } of charts) {
    const guide = figure.querySelector(".guide"), place = (step - told.from) / (told.to - told.from);
    const inside = step !== null && place >= 0 && place <= 1;
    guide.style.display = inside ? "block" : "none";
    if (inside) guide.style.left = 100 * place + "%";
    figure.querySelector(".step").textContent = inside ? "step " + Math.round(step).toLocaleString("en") : "";
    told.lines.forEach((line, at) => {
      outputs[at].textContent = inside ? shown(line.values[nearest(line.steps, step)], told.kind) : last[at];
    });
  }
}
function share(event, plot) {
  const box = plot.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((s) => Math.min(Math.max(s, 0), 0.9999));
}
for (const { figure, told } of charts) {
  const plot = figure.querySelector(".plot");
  plot.addEventListener("pointermove", (event) => point(Math.round(told.from + share(event, plot)[0] * (told.to - told.from))));
  plot.addEventListener("pointerleave", () => point(null));
}
for (const figure of document.querySelectorAll("figure.heat")) {
  const told = JSON.parse(figure.querySelector("script").textContent), plot = figure.querySelector(".plot");
  const said = figure.querySelector(".step");
  plot.addEventListener("pointermove", (event) => {
    const [across, down] = share(event, plot), column = Math.floor(across * told.steps.length);
    const row = Math.floor(down * told.rows.length), value = told.rows[row][column];
    said.textContent = told.names[row] + ", from step " + told.steps[column].toLocaleString("en") +
      (value === null ? "" : ": " + (value < 0 ? "" : "+") + short(100 * value, 3) + " %");
  });
  plot.addEventListener("pointerleave", () => { said.textContent = ""; });
}
// A page of a run that goes on loads itself again, and stays where it was scrolled to.
if (document.body.dataset.reload) {
  const key = "tessera " + location.pathname;
  try { scrollTo(0, Number(sessionStorage.getItem(key) || 0)); } catch { /* no storage for files in this browser */ }
  setInterval(() => {
    if (document.hidden) return;
    try { sessionStorage.setItem(key, String(scrollY)); } catch { /* the same */ }
    location.reload();
  }, 1000 * Number(document.body.dataset.reload));
}
