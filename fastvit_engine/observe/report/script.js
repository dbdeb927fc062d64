// What charts can do besides being looked at: show their values under pointer and keys, and change their axis.
"use strict";
(() => {
  const SIZE = 1000; // side of the charts' own coordinate square
  const NEAR = 0.015; // of the width: how far from the pointer a line's value may lie to be shown
  const page = JSON.parse(document.querySelector("script.axes").textContent);
  let shown = page.shown;

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // ---- from a step to a place on the axis, as axes.py does it

  function interpolate(xs, ys, x) {
    let low = 0, high = xs.length - 1;
    if (x >= xs[high]) return ys[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    const length = xs[high] - xs[low];
    return length > 0 ? ys[low] + ((ys[high] - ys[low]) * (x - xs[low])) / length : ys[low];
  }

  function left(step, run) {
    const knots = page.runs[run];
    const at = shown === "steps" ? step : interpolate(knots.steps, knots[shown], step);
    return clamp(at / page.axes[shown].last, 0, 1);
  }

  function write(value, [kind, digits, suffix]) {
    const fixed = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    const text = kind === "fixed" ? value.toLocaleString("en-US", fixed) : String(Number(value.toPrecision(digits)));
    return text + suffix;
  }

  // ---- one chart

  class Chart {
    constructor(figure) {
      this.canvas = figure.querySelector(".canvas");
      this.svg = this.canvas.querySelector("svg");
      const data = JSON.parse(figure.querySelector("script.data").textContent);
      Object.assign(this, data);
      this.drawn = [...this.svg.querySelectorAll(".line")]; // of a noisy line, first as it is, and then smoothed
      const longest = this.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
      this.stops = longest.x.map((step, at) => [step, longest.run, at]).filter(([, , at]) => longest.y[at] !== null);
      this.stop = this.stops.length - 1;
      this.place();
      this.prepare();
    }

    prepare() {
      this.cursor = this.canvas.appendChild(document.createElement("div"));
      this.cursor.className = "cursor";
      this.box = this.canvas.appendChild(document.createElement("div"));
      this.box.className = "values";
      this.hide();
      const { canvas } = this;
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "slider");
      canvas.setAttribute("aria-label", `${canvas.dataset.title}: values, by arrow keys`);
      canvas.setAttribute("aria-valuemin", 0);
      canvas.setAttribute("aria-valuemax", this.stops.length - 1);
      canvas.addEventListener("pointermove", (event) => this.follow(event));
      canvas.addEventListener("pointerdown", (event) => this.follow(event));
      canvas.addEventListener("pointerleave", () => this.hide());
      canvas.addEventListener("blur", () => this.hide());
      canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.go(this.stop));
      canvas.addEventListener("keydown", (event) => this.press(event));
      this.describe();
    }

    follow(event) {
      const area = this.canvas.getBoundingClientRect();
      this.show((event.clientX - area.left) / area.width);
    }

    press(event) {
      const most = this.stops.length - 1, far = Math.max(1, Math.round(most / 10));
      const to = {
        ArrowLeft: this.stop - 1, ArrowDown: this.stop - 1, ArrowRight: this.stop + 1, ArrowUp: this.stop + 1,
        PageDown: this.stop - far, PageUp: this.stop + far, Home: 0, End: most,
      }[event.key];
      if (event.key === "Escape") this.hide();
      if (to === undefined) return;
      event.preventDefault();
      this.go(clamp(to, 0, most));
    }

    go(stop) {
      this.stop = stop;
      const [step, run] = this.stops[stop];
      this.show(left(step, run));
      this.describe();
    }

    describe() {
      const [step, run] = this.stops[this.stop];
      const { title, rows } = this.values(left(step, run));
      this.canvas.setAttribute("aria-valuenow", this.stop);
      this.canvas.setAttribute("aria-valuetext", [title, ...rows.map((row) => `${row.name} ${row.text}`)].join(", "));
    }

    // The values next to a fraction of the width.
    values(where) {
      const near = this.lines.map((line) => this.nearest(line, where)).filter((found) => found !== null);
      if (near.length === 0) return { where, title: "", rows: [] };
      const first = near.reduce((a, b) => (b.distance < a.distance ? b : a));
      const rows = near.filter((found) => Math.abs(found.left - first.left) <= NEAR);
      const steps = [...new Set(rows.map((found) => found.step))];
      const title = steps.length === 1 ? `step ${steps[0].toLocaleString("en-US")}`
        : `steps ${Math.min(...steps).toLocaleString("en-US")} to ${Math.max(...steps).toLocaleString("en-US")}`;
      return { where: first.left, title, rows };
    }

    nearest(line, where) {
      let found = null;
      line.x.forEach((step, at) => {
        if (line.y[at] === null) return;
        const distance = Math.abs(line.left[at] - where);
        if (found === null || distance < found.distance) {
          const text = write(line.y[at], this.form);
          found = { step, distance, text, left: line.left[at], name: line.name, classes: line.classes };
        }
      });
      return found;
    }

    show(wanted) {
      const { where, title, rows } = this.values(wanted);
      this.cursor.style.left = `${100 * where}%`;
      this.box.replaceChildren(element("b", "", title), ...rows.map((row) => {
        const entry = element("div", row.classes, "");
        entry.append(element("i", "swatch", ""), element("span", "", row.name), element("b", "", row.text));
        return entry;
      }));
      this.box.style.left = where > 0.5 ? "auto" : `calc(${100 * where}% + 0.6rem)`;
      this.box.style.right = where > 0.5 ? `calc(${100 * (1 - where)}% + 0.6rem)` : "auto";
      this.cursor.hidden = this.box.hidden = false;
    }

    hide() {
      this.cursor.hidden = this.box.hidden = true;
    }

    // Where the points of each line lie on the axis that is shown.
    place() {
      for (const line of this.lines) line.left = line.x.map((step) => left(step, line.run));
    }

    draw() {
      const paths = this.drawn.values();
      this.place();
      for (const line of this.lines) {
        this.redraw(paths.next().value, line, line.left);
        if (line.trend) {
          this.redraw(paths.next().value, line.trend, line.trend.x.map((step) => left(step, line.run)));
        }
      }
      this.hide();
      this.describe();
    }

    redraw(path, { y }, lefts) {
      let corners = "", pen = "M";
      y.forEach((value, at) => {
        if (value !== null) {
          const height = 1 - (clamp(value, this.low, this.high) - this.low) / (this.high - this.low);
          corners += `${pen}${(SIZE * lefts[at]).toFixed(1)} ${(SIZE * height).toFixed(1)}`;
        }
        pen = value === null ? "M" : "L";
      });
      path.setAttribute("d", corners);
    }
  }

  function element(name, classes, text) {
    const made = document.createElement(name);
    made.className = classes;
    made.textContent = text;
    return made;
  }

  // ---- the axis of all charts

  function choose(axis) {
    shown = axis;
    charts.forEach((chart) => chart.draw());
    for (const mark of document.querySelectorAll("[data-step]")) {
      const place = (SIZE * left(Number(mark.dataset.step), Number(mark.dataset.run ?? 0))).toFixed(1);
      mark.setAttribute("d", mark.getAttribute("d").replace(/^M[^ ]+/, `M${place}`));
    }
    const { name, ticks } = page.axes[axis];
    for (const columns of document.querySelectorAll(".columns")) {
      columns.replaceChildren(...ticks.map(([at, label]) => {
        const tick = element("span", "", label);
        tick.style.left = `${100 * at}%`;
        return tick;
      }));
      columns.nextElementSibling.textContent = name;
    }
  }

  const charts = [...document.querySelectorAll("figure:has(script.data)")].map((figure) => new Chart(figure));
  const choice = document.querySelector(".axis-choice");
  if (choice && charts.length) {
    choice.hidden = false;
    choice.addEventListener("change", (event) => choose(event.target.value));
  }
})();
