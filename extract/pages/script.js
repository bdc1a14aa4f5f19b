"use strict";
// What the page does beside being read: tables sort, rows open, curves tell their points. Nothing is fetched.
(function () {
  var order = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  var number = /^[<>≤≥]?\s*([-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?=$|[\s[(\/%±])/i;
  var missing = /^(|-|undefined)$/;

  function text(cell) {
    return (cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent).trim();
  }

  function amount(written) {
    var found = number.exec(written);
    return found ? parseFloat(found[1].replace("−", "-").replace(/,/g, "")) : NaN;
  }

  // [row, key] of every row; keys are numbers where most cells are, else text. NaN and "" come last in either direction.
  function keyed(rows, column) {
    var words = rows.map(function (row) { return text(row.cells[column]); });
    var numbers = words.map(amount);
    var known = words.filter(function (word) { return !missing.test(word); }).length;
    var numeric = 2 * numbers.filter(function (n) { return !isNaN(n); }).length > known;
    return rows.map(function (row, i) {
      return numeric ? [row, numbers[i], isNaN(numbers[i])] : [row, words[i], missing.test(words[i])];
    });
  }

  function sort(table, column, direction, first) {
    var body = table.tBodies[0];
    var sums = Array.from(body.rows).filter(function (row) { return row.classList.contains("sum"); });
    var rows = first;
    if (direction) {
      rows = keyed(first, column).sort(function (a, b) {
        if (a[2] || b[2]) { return a[2] - b[2]; }
        return direction * (typeof a[1] === "number" ? a[1] - b[1] : order.compare(a[1], b[1]));
      }).map(function (pair) { return pair[0]; });
    }
    var all = document.createDocumentFragment();
    rows.concat(sums).forEach(function (row) { all.appendChild(row); });
    body.appendChild(all);
  }

  function sortable(table) {
    var head = table.tHead, body = table.tBodies[0];
    if (!head || head.rows.length !== 1 || table.tBodies.length !== 1 || table.classList.contains("still")) { return; }
    var first = Array.from(body.rows).filter(function (row) { return !row.classList.contains("sum"); });
    var cells = Array.from(head.rows[0].cells);
    // a row without a name belongs to the one above it
    var regular = first.every(function (row) { return row.cells.length === cells.length && text(row.cells[0]); });
    if (first.length < 3 || !regular) { return; }
    cells.forEach(function (cell, column) {
      if (!cell.textContent.trim()) { return; }
      var button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      while (cell.firstChild) { button.appendChild(cell.firstChild); }
      cell.appendChild(button);
      button.addEventListener("click", function () {
        var now = cell.getAttribute("aria-sort");
        var next = now === "ascending" ? "descending" : now === "descending" ? "none" : "ascending";
        cells.forEach(function (other) { other.removeAttribute("aria-sort"); });
        if (next !== "none") { cell.setAttribute("aria-sort", next); }
        sort(table, column, next === "ascending" ? 1 : next === "descending" ? -1 : 0, first);
      });
    });
    if (table.caption) { table.caption.appendChild(document.createTextNode(" (the columns' buttons sort it)")); }
  }

  // A row with a link or a fold in its first cell opens it wherever the row is clicked.
  function opening(row) {
    var link = row.cells[0].querySelector("a[href^='#']"), fold = row.cells[0].querySelector("details");
    if (!link && !fold) { return; }
    row.classList.add("opens");
    row.addEventListener("click", function (event) {
      if (event.target.closest("a, summary, code, button") || String(getSelection())) { return; }
      if (link) { link.click(); } else { fold.open = !fold.open; }
    });
  }

  // Where a point of a curve lies in its figure, by the figure's kind; a curve is [threshold, sensitivity, specificity,
  // precision], a list of numbers each.
  var places = {
    "roc": function (curve, i) { return [1 - curve[2][i], curve[1][i]]; },
    "precision-recall": function (curve, i) { return [curve[1][i], curve[3][i]]; }
  };

  var together = [];  // figures of the same curves show the same point

  function telling(figure, curves, names) {
    var svg = figure.querySelector("svg"), place = places[figure.dataset.curves];
    var box = figure.dataset.box.split(" ").map(Number), view = svg.viewBox.baseVal;
    var mark = document.createElementNS(svg.namespaceURI, "circle");
    mark.setAttribute("class", "mark");
    mark.setAttribute("r", "4.5");
    var title = svg.querySelector("title");  // shown by browsers above what the pointer is on
    svg.setAttribute("aria-label", title.textContent);
    svg.removeAttribute("aria-labelledby");
    title.remove();

    var said = document.createElement("output");
    var which = document.createElement("select"), slider = document.createElement("input");
    which.setAttribute("aria-label", "Curve");
    names.forEach(function (name) { which.appendChild(document.createElement("option")).textContent = name; });
    slider.type = "range";
    slider.min = 0;
    slider.setAttribute("aria-label", "Threshold");
    said.textContent = "Point at the curve, or move along it here.";
    var tools = document.createElement("div");
    tools.className = "tools";
    tools.append(which, slider, said);
    svg.after(tools);

    function at(curve, i) {
      var xy = place(curve, i);
      return [box[0] + xy[0] * (box[2] - box[0]), box[1] + xy[1] * (box[3] - box[1])];
    }

    function show(c, i) {
      var curve = curves[c], xy = at(curve, i);
      mark.setAttribute("cx", xy[0]);
      mark.setAttribute("cy", xy[1]);
      svg.appendChild(mark);
      which.selectedIndex = c;
      slider.max = curve[0].length - 1;
      slider.value = i;
      var words = ["threshold " + curve[0][i], "sensitivity " + curve[1][i].toFixed(3),
        "specificity " + curve[2][i].toFixed(3), "precision " + curve[3][i].toFixed(3)].join(", ");
      slider.setAttribute("aria-valuetext", words);
      said.textContent = names[c] + ": " + words;
    }

    function nearest(event) {
      var shown = svg.getBoundingClientRect();
      var x = view.x + (event.clientX - shown.left) / shown.width * view.width;
      var y = view.y + (event.clientY - shown.top) / shown.height * view.height;
      var best = [Infinity, 0, 0];
      curves.forEach(function (curve, c) {
        for (var i = 0; i < curve[0].length; i += 1) {
          var xy = at(curve, i), away = Math.hypot(xy[0] - x, xy[1] - y);
          if (away < best[0]) { best = [away, c, i]; }
        }
      });
      if (best[0] < 60) { all(best[1], best[2]); }
    }

    function all(c, i) {
      together.forEach(function (other) { other(c, i); });
    }

    together.push(show);
    which.hidden = names.length < 2;
    slider.max = curves[0][0].length - 1;
    slider.value = 0;
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    slider.addEventListener("input", function () { all(which.selectedIndex, Number(slider.value)); });
    which.addEventListener("change", function () {
      all(which.selectedIndex, Math.min(Number(slider.value), curves[which.selectedIndex][0].length - 1));
    });
  }

  // What scrolls sideways can be scrolled with the keyboard.
  function reachable(box) {
    var wide = box.scrollWidth > box.clientWidth, caption = box.querySelector("caption");
    box.toggleAttribute("tabindex", wide);
    if (!wide) { return; }
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", caption ? caption.textContent : "Wider than the page");
  }

  document.querySelectorAll("table").forEach(sortable);
  document.querySelectorAll(".scroll").forEach(function (box) { new ResizeObserver(function () { reachable(box); }).observe(box); });
  document.querySelectorAll("tbody tr").forEach(opening);
  var data = document.getElementById("curves");
  if (data) {
    var curves = JSON.parse(data.textContent);
    var names = Array.from(document.querySelectorAll("#curve-names li")).map(function (one) { return one.textContent; });
    document.querySelectorAll("figure[data-curves]").forEach(function (figure) { telling(figure, curves, names); });
  }
  addEventListener("beforeprint", function () {
    document.querySelectorAll("details.print:not([open])").forEach(function (fold) {
      fold.dataset.shut = "";
      fold.open = true;
    });
  });
  addEventListener("afterprint", function () {
    document.querySelectorAll("details[data-shut]").forEach(function (fold) {
      delete fold.dataset.shut;
      fold.open = false;
    });
  });
})();
