(function () {
  "use strict";
  var root = document.documentElement;
  root.classList.add("js");
  function keep(value) { try { if (value) localStorage.setItem("temper-theme", value); return localStorage.getItem("temper-theme"); } catch (e) { return null; } }
  var kept = keep();
  if (kept === "dark" || kept === "light") root.setAttribute("data-theme", kept);
  function dark() {
    var set = root.getAttribute("data-theme");
    return set ? set === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function all(q, from) { return Array.prototype.slice.call((from || document).querySelectorAll(q)); }

  all("[data-do=theme]").forEach(function (b) {
    b.addEventListener("click", function () {
      var next = dark() ? "light" : "dark";
      root.setAttribute("data-theme", next);
      keep(next);
    });
  });

  all("[data-do=copy]").forEach(function (b) {
    b.addEventListener("click", function () {
      var pre = document.getElementById(b.getAttribute("data-of"));
      function done() { var was = b.textContent; b.textContent = "Copied"; setTimeout(function () { b.textContent = was; }, 1400); }
      function old() {
        var range = document.createRange(); range.selectNodeContents(pre);
        var s = getSelection(); s.removeAllRanges(); s.addRange(range);
        try { document.execCommand("copy"); done(); } catch (e) { /* the text is selected: the keyboard does the rest */ }
      }
      if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(pre.textContent).then(done, old); else old();
    });
  });

  all(".dial").forEach(function (box) {
    var slider = box.querySelector("input[type=range]"), rows = all("tbody tr", box), out = box.querySelector("output");
    if (!slider) return;
    function turn() {
      rows.forEach(function (r, i) { r.classList.toggle("now", i === +slider.value); });
      var cells = all("td, th", rows[+slider.value]).map(function (c) { return c.textContent.trim(); });
      out.textContent = "strength " + cells[0] + ": target " + cells[1] + ", retained " + cells[2] + " (" + cells[3] + " points)";
    }
    slider.addEventListener("input", turn);
    turn();
  });

  var list = document.getElementById("item-list");
  if (!list) return;
  var cards = all(".item", list), PAGE = 12, most = PAGE, kind = "", said = document.getElementById("item-said");
  var more = document.getElementById("item-more"), skill = document.getElementById("item-skill"), find = document.getElementById("item-find");
  var words = cards.map(function (c) { return c.textContent.toLowerCase(); });
  function draw() {
    var want = find.value.trim().toLowerCase(), match = 0, open = 0;
    cards.forEach(function (c, i) {
      var yes = (!kind || c.dataset.status === kind) && (!skill.value || c.dataset.skill === skill.value) && (!want || words[i].indexOf(want) >= 0);
      if (yes) match++;
      yes = yes && open < most;
      if (yes) open++;
      c.hidden = !yes;
    });
    said.textContent = match ? "Showing " + open + " of " + match + (match === 1 ? " item" : " items") : "No item matches";
    more.hidden = open >= match;
  }
  function again() { most = PAGE; draw(); }
  all("[data-status-filter]").forEach(function (b) {
    b.addEventListener("click", function () {
      kind = b.getAttribute("data-status-filter");
      all("[data-status-filter]").forEach(function (o) { o.setAttribute("aria-pressed", String(o === b)); });
      again();
    });
  });
  skill.addEventListener("change", again);
  find.addEventListener("input", again);
  more.addEventListener("click", function () { most += PAGE * 2; draw(); });
  draw();
})();
