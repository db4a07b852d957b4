"use strict";
// Draws the charts, and lets a rectangle drawn on the parallel coordinates, or the fields below them, pick trials.

const known = JSON.parse(document.getElementById("data").textContent);
const options = {
  renderer: "svg", actions: false, ast: true, defaultStyle: false, config: known.config,
  tooltip: { disableDefaultStyle: true },
};

async function draw() {
  const views = {};
  for (const place of document.querySelectorAll("[data-chart]")) {
    const name = place.dataset.chart;
    views[name] = (await vegaEmbed(place, known.charts[name], options)).view;
  }
  if (views.parallel) filtering(views.parallel, known.filter);
  document.documentElement.dataset.drawn = Object.keys(views).length;
}

function filtering(view, { axes, trials, shown }) {
  const lines = structuredClone(known.charts.parallel.datasets.trials).reverse(); // the best first; Vega marks rows that it has read
  const whole = () => axes.map((axis) => (axis.choices ? new Set(axis.choices.map((_, index) => index)) : [0, 1]));
  const fields = axes.map((_, number) => [...document.querySelectorAll(`[data-axis="${number}"] input`)]);
  const chart = document.getElementById("chart-parallel");
  let kept = whole(), before = kept; // what each axis keeps: numbers of choices, or places from 0 to 1

  const open = (number) => (axes[number].choices ? kept[number].size === axes[number].choices.length : kept[number][0] <= 0 && kept[number][1] >= 1);
  const place = (axis, value) => {
    const [low, high, at] = [axis.low, axis.high, value].map((each) => (axis.log ? Math.log(each) : each));
    return high > low ? (at - low) / (high - low) : 0.5;
  };
  const value = (axis, at) => (axis.log ? axis.low * (axis.high / axis.low) ** at : axis.low + at * (axis.high - axis.low));
  const choicePlace = (axis, index) => index / Math.max(1, axis.choices.length - 1);

  function passes(line) {
    return axes.every((axis, number) => {
      if (open(number)) return true;
      const at = line[`p${number}`];
      if (at === null) return false;
      if (axis.choices) return kept[number].has(Math.round(at * Math.max(1, axis.choices.length - 1)));
      return at >= kept[number][0] - 1e-6 && at <= kept[number][1] + 1e-6;
    });
  }

  function show(skip) {
    const passing = lines.map(passes);
    view.data("kept", lines.filter((_, index) => passing[index]).map((line) => ({ ...line })).reverse());
    view.data("ranges", axes.flatMap((axis, number) => {
      if (open(number)) return [];
      if (!axis.choices) return [{ axis: `p${number}`, low: kept[number][0], high: kept[number][1] }];
      return [...kept[number]].map((index) => choicePlace(axis, index)).map((at) => ({ axis: `p${number}`, low: at - 0.02, high: at + 0.02 }));
    }));
    view.runAsync();
    axes.forEach((axis, number) => {
      if (number === skip) return;
      if (axis.choices) fields[number].forEach((box, index) => { box.checked = kept[number].has(index); });
      else fields[number].forEach((field, end) => { field.value = open(number) ? "" : Number(value(axis, kept[number][end]).toPrecision(3)); });
    });
    const rows = trials.filter((_, index) => passing[index]);
    const body = document.createElement("tbody");
    for (const cells of rows.slice(0, shown)) {
      const row = body.insertRow();
      cells.forEach((text, index) => {
        const cell = row.appendChild(document.createElement(index ? "td" : "th"));
        cell.textContent = text;
        if (index) cell.className = "number"; else cell.scope = "row";
      });
    }
    document.querySelector("#trials-table tbody").replaceWith(body);
    const cut = rows.length > shown ? `; the best ${shown} are listed` : "";
    document.getElementById("match").textContent = `${rows.length} of ${trials.length} trials${cut}`;
  }

  chart.addEventListener("pointerdown", () => { before = kept.slice(); }, true);
  view.addSignalListener("brush", (_, brush) => {
    if (!brush.axis || !brush.place) { kept = whole(); show(); return; }
    const [low, high] = [Math.min(...brush.place), Math.max(...brush.place)];
    kept = before.slice();
    for (const name of brush.axis) {
      const number = Number(name.slice(1)), axis = axes[number];
      kept[number] = axis.choices
        ? new Set(axis.choices.map((_, index) => index).filter((index) => choicePlace(axis, index) >= low && choicePlace(axis, index) <= high))
        : [Math.max(0, low), Math.min(1, high)];
    }
    show();
  });
  fields.forEach((inputs, number) => inputs.forEach((field) => field.addEventListener("input", () => {
    const axis = axes[number];
    kept = kept.slice();
    kept[number] = axis.choices
      ? new Set(inputs.flatMap((box, index) => (box.checked ? [index] : [])))
      : inputs.map((input, end) => (input.value === "" || (axis.log && input.valueAsNumber <= 0) ? end : place(axis, input.valueAsNumber)));
    show(number);
  })));
  document.getElementById("all-trials").addEventListener("click", () => { kept = whole(); show(); });
  show();
}

draw().catch((error) => {
  document.querySelector("header").insertAdjacentText("beforeend", `The charts could not be drawn: ${error.message}`);
  throw error;
});
