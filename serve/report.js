"use strict";
/* Owns what moves in the report: the charts, and the browser of samples. Text is put in as text nodes and never as
   markup; the page's policy lets no other script run and opens no connection. */
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => (byId(id) ? JSON.parse(byId(id).textContent) : null);

  // ---------------------------------------------------------------------------------------------------------- charts

  const figures = read("figures") || {};

  /** Return a figure with the names of CSS variables replaced by what they are in the reader's theme. */
  function painted(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => painted(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
    }
    return value;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const [key, figure] of Object.entries(figures)) {
      const { data, layout } = painted(figure, style);
      Plotly.react(byId("plot-" + key), data, layout, { responsive: true, displayModeBar: false });
    }
  }

  if (Object.keys(figures).length) {
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    for (const key of Object.keys(figures)) {
      byId("plot-" + key).on("plotly_click", (event) => {
        const to = event.points[0] && event.points[0].customdata;
        if (typeof to === "string" && to.startsWith("#samples?")) go(to, byId("figure-" + key));
      });
    }
  }

  // ------------------------------------------------------------------------------------------------------------ text

  // What can't be seen: controls but tab and line feed, formats, separators, what Unicode calls ignorable.
  const HIDDEN = /(?![\t\n])[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/u;

  /** Append text to a node, each invisible character as its code point. */
  function write(node, text) {
    let plain = "";
    const flush = () => {
      if (plain) node.append(document.createTextNode(plain));
      plain = "";
    };
    for (const character of text) {
      if (!HIDDEN.test(character)) {
        plain += character;
        continue;
      }
      flush();
      const shown = document.createElement("span");
      shown.className = "hidden-character";
      shown.textContent = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(shown);
    }
    flush();
    return node;
  }

  /** Return an element; strings among its children become text nodes. */
  function element(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    for (const child of children) {
      if (typeof child === "string") write(node, child);
      else if (child) node.append(child);
    }
    return node;
  }

  /** Return a text of the journal; `flaws` are [start, end) in code points, shown as marks. */
  function textElement(className, stored, flaws = []) {
    const [text, missing] = Array.isArray(stored) ? stored : [stored, 0];
    const node = element("pre", className);
    const characters = Array.from(text);
    let cursor = 0;
    for (const [start, end] of flaws.slice().sort((a, b) => a[0] - b[0])) {
      const from = Math.max(start, cursor);
      if (from >= end || from >= characters.length) continue;
      write(node, characters.slice(cursor, from).join(""));
      node.append(element("mark", "", characters.slice(from, end).join("")));
      cursor = end;
    }
    write(node, characters.slice(cursor).join(""));
    if (!text) node.append(element("span", "about", "(empty)"));
    if (missing) node.append(element("span", "about", ` … ${missing.toLocaleString("en")} characters more`));
    return node;
  }

  // --------------------------------------------------------------------------------------------------------- samples

  const samples = read("samples-data");
  if (!samples) return;
  const { dimensions, values, groups, texts, abouts, critiques, units } = samples;
  const NAMES = {
    set: "rows", iteration: "iteration", cell: "kind of problem", critic: "critic says", expert: "expert",
    truth: "truth (for the report only)", sure: "P(good), where truth is known", attack: "attack", fate: "what became of it",
  };
  const SETS = {
    live: "live answers", proposals: "dropped proposals", sealed: "sealed problems", probe: "probe problems",
    out_of_distribution: "out of distribution", attack_set: "frozen attack set",
  };
  const PAGE = 15;
  const value = (group, name) => values[dimensions.indexOf(name)][groups[group][dimensions.indexOf(name)]];
  const shownValue = (name, text) => (name === "set" ? SETS[text] || text : text);
  const plural = (num, one, many) => `${num.toLocaleString("en")} ${num === 1 ? one : many}`;

  // The answers to an evaluation problem, whenever it was asked.
  const problem = (rows, query) => value(rows[0][0], "set") + "/" + query;
  const asked = new Map();
  for (const [query, , rows] of units) {
    const key = problem(rows, query);
    asked.set(key, [...(asked.get(key) || []), ...rows]);
  }

  let wanted = {};   // by dimension, the values that a row may have
  let search = "";
  let numPages = 1;
  let origin = null; // the figure or table that led here

  function parse(hash) {
    const found = {};
    for (const [name, text] of new URLSearchParams(hash.slice("#samples?".length))) {
      if (dimensions.includes(name)) (found[name] ||= []).push(text);
    }
    return found;
  }

  function address(filters) {
    const pairs = Object.entries(filters).flatMap(([name, found]) => found.map((text) => [name, text]));
    return "#samples?" + new URLSearchParams(pairs);
  }

  /** Return, by group, whether its rows are wanted, but for one dimension. */
  function matching(filters, but = null) {
    return groups.map((_, group) =>
      Object.entries(filters).every(([name, found]) => name === but || found.includes(value(group, name)))
    );
  }

  function go(to, from) {
    origin = from || null;
    if (location.hash === to) open();
    else location.hash = to;
  }

  /** Show what the address names, and bring the reader there. */
  function open() {
    wanted = parse(location.hash);
    search = "";
    byId("search").value = "";
    numPages = 1;
    render();
    byId("found").parentElement.scrollIntoView({ behavior: "instant", block: "start" });
    byId("found").focus({ preventScroll: true });
  }

  function render() {
    const wantedGroups = matching(wanted);
    const lower = search.toLowerCase();
    const has = (place) => String(Array.isArray(texts[place]) ? texts[place][0] : texts[place]).toLowerCase().includes(lower);
    const found = [];
    let numShown = 0;
    for (const unit of units) {
      const [query, , rows] = unit;
      const isFound = (row) =>
        wantedGroups[row[0]] &&
        (!lower || has(query) || (row[1] !== null && has(row[1])) || row[3].some((c) => has(critiques[c].text)));
      const mine = rows.filter(isFound);
      if (mine.length) found.push([unit, mine]);
      numShown += mine.length;
    }
    const total = groups.reduce((sum, group, i) => sum + (wantedGroups[i] ? group[dimensions.length] : 0), 0);
    renderFilters();
    renderCount(numShown, total, found.length);
    const list = byId("units");
    list.replaceChildren(...found.slice(0, numPages * PAGE).map(([unit, mine]) => unitElement(unit, mine)));
    if (!found.length) {
      list.append(element("p", "empty", total ? "None of these rows is in this file." : "There is no such row in this run."));
    }
    const rest = found.length - numPages * PAGE;
    byId("more").hidden = rest <= 0;
    byId("more").textContent = `Show ${Math.min(PAGE, rest)} more of ${rest.toLocaleString("en")}`;
  }

  function renderCount(numShown, total, numUnits) {
    const what = Object.entries(wanted).map(([name, found]) => {
      const said = found.map((text) => shownValue(name, text)).join(" or ");
      return name === "set" ? said : name === "iteration" ? `iteration ${said}` : `${NAMES[name]}: ${said}`;
    });
    const node = byId("found");
    node.replaceChildren(element("b", "", what.join(" · ") || "everything"));
    const scope = search ? `${plural(numShown, "row", "rows")} with “${search}” among those in this file`
      : numShown === total ? `${plural(total, "row", "rows")}, all in this file`
      : `${numShown.toLocaleString("en")} of ${plural(total, "row", "rows")} are in this file`;
    node.append(element("span", "about", ` — ${scope}` + (numUnits < numShown ? `, of ${plural(numUnits, "query", "queries")}` : "")));
    const back = byId("back");
    back.hidden = !origin;
    if (origin) back.textContent = "↑ back to " + (origin.dataset.title || "where you were");
    for (const preset of document.querySelectorAll(".presets a")) {
      const isThis = JSON.stringify(parse(preset.getAttribute("href"))) === JSON.stringify(wanted);
      if (isThis) preset.setAttribute("aria-current", "true");
      else preset.removeAttribute("aria-current");
    }
  }

  /** Offer, for every dimension, the values that the other filters leave. */
  function renderFilters() {
    for (const name of dimensions) {
      const select = byId("filter-" + name);
      const own = wanted[name] || [];
      const left = matching(wanted, name);
      const offered = new Set(own);
      groups.forEach((_, group) => left[group] && offered.add(value(group, name)));
      offered.delete("");
      const sorted = [...offered].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      const options = [["", "any"], ...sorted.map((text) => [text, shownValue(name, text)])];
      if (own.length > 1) options.push(["several", own.map((text) => shownValue(name, text)).join(" or ")]);
      select.replaceChildren(
        ...options.map(([text, said]) => {
          const option = element("option", "", said);
          option.value = text;
          return option;
        })
      );
      select.value = own.length > 1 ? "several" : own[0] || "";
      select.parentElement.hidden = offered.size < 2 && !own.length;
    }
  }

  function chip(text) {
    const tone = { pass: "good", right: "good", fail: "bad", wrong: "bad" }[text] || "";
    return element("span", "chip " + tone, text);
  }

  function unitElement([query, about, rows], mine) {
    const known = abouts[about];
    const group = rows[0][0];
    const isLoop = ["live", "proposals"].includes(value(group, "set"));
    const iteration = value(group, "iteration");
    const where = [
      shownValue("set", value(group, "set")),
      isLoop ? `iteration ${iteration}` : iteration === "0" ? "before training" : `after iteration ${iteration}`,
      value(group, "cell"),
      known.attack ? `written by the attacker (${known.attack.replaceAll("_", " ")}, ${known.attacker})` : "",
      known.split ? `${known.split} split` : "",
      value(group, "attack") ? `attack ${value(group, "attack")}` : "",
      isLoop && abouts[rows[0][2]].version ? `answered by ${abouts[rows[0][2]].version}` : "",
    ];
    const head = element("header", "", textElement("query", texts[query]), element("p", "about", where.filter(Boolean).join(" · ")));
    const card = element("article", "card unit", head);
    for (const [row, num] of alike(mine)) card.append(rowElement(row, num));
    const unseen = rows.filter((row) => !mine.includes(row));
    const others = isLoop ? unseen : asked.get(problem(rows, query)).filter((row) => !rows.includes(row));
    if (others.length) {
      const said = isLoop ? `${plural(others.length, "other answer", "other answers")} to this query`
        : `what it answered ${plural(others.length, "other time", "other times")}`;
      const rest = element("details", "others", element("summary", "", said));
      // Drawn when opened: most never are.
      rest.addEventListener("toggle", () => {
        if (rest.open && rest.children.length === 1) for (const [row, num] of alike(others)) rest.append(rowElement(row, num));
      });
      card.append(rest);
    }
    return card;
  }

  /** Return [row, how many] with rows that say the same thing once. */
  function alike(rows) {
    const found = new Map();
    for (const row of rows) {
      const key = JSON.stringify(row);
      found.set(key, [row, (found.get(key) || [row, 0])[1] + 1]);
    }
    return found.values();
  }

  function rowElement([group, text, about, own], num) {
    const known = abouts[about];
    const judges = element("dl", "judges");
    const say = (name, ...said) => judges.append(element("dt", "", name), element("dd", "", ...said));
    if (num > 1) say("same", `${num} answers`);
    const isLoop = value(group, "set") === "live";
    const scores = own.map((place) => critiques[place].score).filter((score) => score !== null);
    const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
    const critic = value(group, "critic");
    if (critic) say("critic", chip(critic), scores.length ? ` P(good) ${mean < 0.0005 ? "< 0.001" : mean.toFixed(3)}` : "");
    const expert = value(group, "expert");
    if (expert && expert !== "not asked") say("expert", chip(expert === "no label" ? expert : known.counted), expert === "no label" ? "" : ` ${expert}`);
    if (known.counted && known.counted !== critic && expert === "not asked") say("counted", chip(known.counted));
    const truth = value(group, "truth");
    if (truth && truth !== "not asked") say("truth", chip(truth));
    if (value(group, "fate")) say(isLoop ? "training" : "outcome", value(group, "fate"));
    if (known.well_formed === false) say("form", "not well-formed");
    if (known.end && known.end !== "stop") say("ended by", known.end);
    if (known.version && !isLoop) say("learner", known.version);
    if (text === null) return element("div", "answer plain", judges);
    const issues = own.flatMap((place) => critiques[place].issues);
    const answer = element("div", "", element("h4", "", "answer"), textElement("text", texts[text], issues));
    if (!own.length) return element("div", "answer plain", judges, answer);
    return element("div", "answer", judges, answer, element("div", "", ...own.map(critiqueElement)));
  }

  function critiqueElement(place) {
    const critique = critiques[place];
    const node = element("div", "", element("h4", "", `critique (${critique.version})`), textElement("text", texts[critique.text]));
    if (critique.issues.length) {
      node.append(
        element("ul", "issues", ...critique.issues.map(([, , category, explanation, fix]) =>
          element("li", "", element("b", "", category + ": "), explanation, fix && !explanation.includes(fix) ? `; better: ${fix}` : "")))
      );
    }
    if (critique.marks.length) node.append(element("p", "marks", "P(correct) at its marks: " + critique.marks.map((mark) => mark.toFixed(2)).join(" ")));
    return node;
  }

  // ---------------------------------------------------------------------------------------------------------- events

  for (const name of dimensions) {
    const select = element("select", "");
    select.id = "filter-" + name;
    byId("filters").insertBefore(element("label", "", NAMES[name], select), byId("search").parentElement);
    select.addEventListener("change", () => {
      if (select.value === "several") return;
      const filters = { ...wanted, [name]: [select.value] };
      if (!select.value) delete filters[name];
      // A filter that leaves nothing gives way: what was set just now counts.
      for (const other of Object.keys(filters)) {
        if (other !== name && !matching(filters).some(Boolean)) delete filters[other];
      }
      wanted = filters;
      numPages = 1;
      history.replaceState(null, "", address(wanted));
      render();
    });
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", () => {
    search = byId("search").value;
    numPages = 1;
    render();
  });
  byId("clear").addEventListener("click", () => go("#samples?", origin));
  byId("more").addEventListener("click", () => {
    const first = numPages++ * PAGE;
    render();
    const next = byId("units").children[first];
    next.tabIndex = -1;
    next.focus({ preventScroll: true });
  });
  byId("back").addEventListener("click", () => {
    origin.scrollIntoView({ behavior: "instant", block: "center" });
    origin.tabIndex = -1;
    origin.focus({ preventScroll: true });
  });
  document.addEventListener("click", (event) => {
    const anchor = event.target instanceof Element && event.target.closest('a[href^="#samples?"]');
    if (!anchor) return;
    event.preventDefault();
    go(anchor.getAttribute("href"), anchor.closest("[data-title]"));
  });
  addEventListener("hashchange", () => {
    if (location.hash.startsWith("#samples?")) open();
  });
  for (const part of document.querySelectorAll("[data-scripted]")) part.hidden = false;
  if (location.hash.startsWith("#samples?")) open();
  else {
    const preset = document.querySelector(".presets a");
    wanted = preset ? parse(preset.getAttribute("href")) : {};
    render();
  }
})();
